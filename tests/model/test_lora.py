"""Adapters: what is trained, that PEFT reads what is written, and that merging changes no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rayva.errors import RecipeError
from rayva.model.freeze import apply_freeze_policy, is_adapter
from rayva.model.lora import add_adapters, merged_state, remove_adapters, save_adapter
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Lora

LORA = Lora(r=3, alpha=12.0)
IDS = torch.arange(3, 20)[None]


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _adapted() -> LlamaForCausalLM:
    """With adapters as a training would leave them."""
    language = _base()
    add_adapters(language, LORA)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return language.eval()


@torch.no_grad()
def _logits(language: nn.Module) -> Tensor:
    logits: Tensor = language(IDS).logits
    return logits


def test_adapters_alone_are_trained_beside_the_projector() -> None:
    model = VisionLanguageModel(_base(), nn.Linear(4, 16))
    add_adapters(model.language, LORA)
    trained = apply_freeze_policy(model, "all")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"projector.weight", "projector.bias"} < names
    assert all("lora_" in name or name.startswith("projector.") for name in names)
    # Seven matrices of each of two layers, each with A [r, in] and B [out, r].
    assert len(names) == 2 * 7 * 2 + 2
    assert trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_new_adapters_change_nothing() -> None:
    language = _base()
    before = _logits(language)
    add_adapters(language, LORA)
    torch.testing.assert_close(_logits(language), before)


def test_peft_reads_the_saved_adapter(tmp_path: Path) -> None:
    language = _adapted()
    save_adapter(tmp_path, language.state_dict(), LORA, "some/base", None)
    read = PeftModel.from_pretrained(_base(), tmp_path)
    assert read.peft_config["default"].base_model_name_or_path == "some/base"
    torch.testing.assert_close(_logits(read), _logits(language))
    assert (_logits(_base()) - _logits(language)).abs().max() > 0.01


def test_merged_weights_answer_as_the_adapted_model(tmp_path: Path) -> None:
    language = _adapted()
    expected = _logits(language)
    merged = merged_state(language.state_dict(keep_vars=True), LORA)
    remove_adapters(language)
    assert not any(is_adapter(name) for name, _ in language.named_parameters())
    assert set(merged) == set(_base().state_dict())
    language.save_pretrained(tmp_path, state_dict={name: t.detach() for name, t in merged.items()})
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_named_matrices_alone_are_adapted() -> None:
    language = _base()
    add_adapters(language, Lora(r=2, targets=("q_proj", "v_proj")))
    adapted = {name.split(".lora_")[0] for name in language.state_dict() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("nothing",), "nothing"), (("q_proj", "v_porj"), "names v_porj:"),
        (("lm_head", "q_proj"), "lm_head"),
        (("q_proj", "embed_tokens"), "embed_tokens"), ((), "nothing"), (("proj",), "proj"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_adapted_are_refused(targets: tuple[str, ...], told: str) -> None:
    language = _base()
    with pytest.raises(RecipeError, match=told) as refused:
        add_adapters(language, Lora(r=2, targets=targets))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(refused.value)
    assert not any(is_adapter(name) for name, _ in language.named_parameters())


def test_names_with_their_layer_are_targets() -> None:
    language = _base()
    add_adapters(language, Lora(r=2, targets=("layers.1.mlp.up_proj",)))
    adapted = {name.split(".lora_")[0] for name in language.state_dict() if ".lora_" in name}
    assert adapted == {"model.layers.1.mlp.up_proj"}
