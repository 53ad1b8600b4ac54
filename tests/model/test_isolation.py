"""Whatever the model: no sample sees another one in the layout that is chosen for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rayva.errors import WeightsError
from rayva.model.isolation import find_layout
from rayva.model.language import load_language_model
from rayva.model.vlm import VisionLanguageModel

VOCABULARY, HIDDEN = 60, 32
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}


def _model(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config: PretrainedConfig = getattr(transformers, kind)(**settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # as large as trained ones: a border then shows
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [
        ("LlamaConfig", LLAMA_LIKE, "flat"),
        ("Qwen2Config", LLAMA_LIKE, "flat"),
        ("MistralConfig", LLAMA_LIKE | {"sliding_window": 5}, "rows"),
        # Its layers hand no borders through.
        ("NemotronConfig", LLAMA_LIKE | {"head_dim": 8}, "rows"),
        # A convolution reaches over the border.
        ("Lfm2Config", LLAMA_LIKE | {"layer_types": ["conv", "full_attention"]}, "padded"),
        ("BloomConfig", COMMON | {"n_layer": 2, "n_head": 4}, "padded"),
        # Values of another size than keys.
        (
            "DeepseekV3Config",
            LLAMA_LIKE
            | {
                "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
            },
            "flat",
        ),
    ],
)  # fmt: skip
def test_the_layout_is_one_in_which_samples_are_alone(
    kind: str, settings: dict[str, Any], layout: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = VisionLanguageModel(_model(kind, settings, dtype), nn.Linear(6, HIDDEN, dtype=dtype))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert find_layout(model, packing=True) == layout
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert ("see each other" in caplog.text) == (layout == "padded")
    assert find_layout(model, packing=False) == "padded"


@pytest.mark.parametrize("seed", range(3))
def test_sparse_models_in_bf16_are_not_mistaken(seed: int) -> None:
    """Rounding sends tokens to other experts there, which looks like another sample's influence."""
    settings = LLAMA_LIKE | {"num_hidden_layers": 12, "num_local_experts": 4}
    model = _model("MixtralConfig", settings, torch.bfloat16)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
    assert find_layout(VisionLanguageModel(model, nn.Linear(6, HIDDEN, dtype=torch.bfloat16)), True) == "flat"


def test_a_model_that_sees_padding_is_refused() -> None:
    model = _model("BertGenerationConfig", COMMON | {"intermediate_size": 48, "is_decoder": False})
    with pytest.raises(WeightsError, match=r"bert-generation.*with padding behind it"):
        find_layout(VisionLanguageModel(model, nn.Linear(6, HIDDEN)), packing=True)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "FalconH1Config",
            LLAMA_LIKE
            | {
                "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                "mamba_n_groups": 1, "lm_head_multiplier": 0.04,
            },
        ),
        (
            "Llama4TextConfig",
            LLAMA_LIKE | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        ),
    ],
)  # fmt: skip
def test_a_model_that_changes_its_logits_is_refused_where_it_is_loaded(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    _model(kind, settings).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"changes its hidden states or logits around the LM head"):
        load_language_model(str(tmp_path), torch.float32)


def test_a_model_with_a_decoder_of_its_own_is_loaded(tmp_path: Path) -> None:
    _model("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}).save_pretrained(tmp_path)
    assert load_language_model(str(tmp_path), torch.bfloat16).config.model_type == "opt"
