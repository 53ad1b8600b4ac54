"""The last layer's MLP runs where there are labels alone, and neither the loss nor a gradient tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rayva.model.batch import Batch, Row, collate, collate_packed
from rayva.model.isolation import narrow_last_mlp
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IGNORE_INDEX, IMAGE_TOKEN_INDEX

VISION, VOCABULARY, HIDDEN = 6, 60, 32
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}


def _model(kind: str, settings: dict[str, Any]) -> VisionLanguageModel:
    torch.manual_seed(0)
    config: PretrainedConfig = getattr(transformers, kind)(**settings)
    language: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for parameter in language.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
    return VisionLanguageModel(language, nn.Linear(VISION, HIDDEN))


def _rows() -> list[Row]:
    rng = torch.Generator().manual_seed(1)
    rows = []
    for places, questions, answers in ((4, 3, 5), (0, 2, 3), (4, 6, 0)):
        ids = torch.randint(3, VOCABULARY, (questions + answers,), generator=rng).tolist()
        labels = [IGNORE_INDEX] * (places + questions) + ids[questions:]
        features_MD = torch.randn(places, VISION, generator=rng) if places else None
        rows.append(Row([IMAGE_TOKEN_INDEX] * places + ids, labels, features_MD))
    return rows


def _loss_and_gradients(model: VisionLanguageModel, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    loss, _ = model.loss_sum(batch)
    loss.backward()
    # A parameter that is used nowhere has no gradient, or one of zero.
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return [loss.detach(), *gradients]


def _rows_of_the_mlp(model: VisionLanguageModel) -> list[torch.Size]:
    assert model.last_mlp is not None
    seen: list[torch.Size] = []
    first = next(part for part in model.last_mlp.mlp.modules() if isinstance(part, nn.Linear))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1]))
    return seen


@pytest.mark.parametrize("layout", ["padded", "rows"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LlamaConfig", LLAMA_LIKE),
        ("Qwen3Config", LLAMA_LIKE | {"head_dim": 8}),
        # A norm stands behind the MLP.
        ("Gemma3TextConfig", LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4}),
        # Attention and MLP stand side by side.
        ("GPTNeoXConfig", COMMON | {"intermediate_size": 48}),
        (
            "GPT2Config",
            {
                "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
                "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            },
        ),
    ],
)  # fmt: skip
def test_loss_and_gradients_stay_the_same(kind: str, settings: dict[str, Any], layout: str) -> None:
    model = _model(kind, settings)
    rows = _rows()
    batch = collate(rows, VISION) if layout == "padded" else collate_packed([rows], VISION)
    expected = _loss_and_gradients(model, batch)
    assert narrow_last_mlp(model)
    for found, wanted in zip(_loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_it_runs_at_supervised_positions_only_and_elsewhere_as_ever() -> None:
    model = _model("LlamaConfig", LLAMA_LIKE)
    batch = collate(_rows(), VISION)
    whole_BTH = model.forward_hidden(batch)
    assert narrow_last_mlp(model)
    seen = _rows_of_the_mlp(model)
    _, count = model.loss_sum(batch)
    assert seen == [torch.Size([1, int(count)])]
    assert count == 5 + 3
    # Whoever asks for hidden states gets all of them.
    torch.testing.assert_close(model.forward_hidden(batch), whole_BTH)


def test_a_batch_without_labels_still_reaches_every_weight() -> None:
    """With ZeRO 3, a rank that skips a module leaves the others waiting."""
    model = _model("LlamaConfig", LLAMA_LIKE)
    assert narrow_last_mlp(model)
    seen = _rows_of_the_mlp(model)
    loss, *_ = _loss_and_gradients(model, collate([], VISION))
    assert loss == 0
    assert seen == [torch.Size([1, 0])]
    for name, parameter in model.language.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


def test_gradient_checkpointing_leaves_out_that_layer() -> None:
    model = _model("LlamaConfig", LLAMA_LIKE)
    model.train()
    batch = collate(_rows(), VISION)
    expected = _loss_and_gradients(model, batch)
    assert narrow_last_mlp(model)
    assert model.last_mlp is not None
    model.language.gradient_checkpointing_enable({"use_reentrant": False})
    model.last_mlp.keep_activations()
    seen = _rows_of_the_mlp(model)
    layers: Any = model.language.base_model.layers
    first: list[object] = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: first.append(None))
    for found, wanted in zip(_loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert (len(seen), len(first)) == (1, 2)


class _MixesPositions(nn.Module):
    """An MLP whose output at a position depends on the positions before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        mixed: Tensor = self.inner(hidden_BTH.cumsum(1))
        return mixed


def _mixing() -> VisionLanguageModel:
    model = _model("LlamaConfig", LLAMA_LIKE)
    layers: Any = model.language.base_model.layers
    layers[-1].mlp = _MixesPositions()
    return model


@pytest.mark.parametrize(
    "make",
    [
        _mixing,
        # Its MLP adds the residual itself.
        lambda: _model("BloomConfig", COMMON | {"n_layer": 2, "n_head": 4}),
        # Its MLP is no module of its own.
        lambda: _model("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    ],
    ids=["mixing", "bloom", "opt"],
)
def test_other_models_are_left_alone(make: Any) -> None:
    model = make()
    batch = collate(_rows(), VISION)
    model.eval()
    expected, _ = model.loss_sum(batch)
    assert not narrow_last_mlp(model)
    assert model.last_mlp is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.language.modules())
    assert model.loss_sum(batch)[0] == expected
