"""Training, serving and evaluation go by one number of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PretrainedConfig,
)

from rayva.errors import RecipeError
from rayva.model.positions import positions
from rayva.model.vlm import VisionLanguageModel
from rayva.training.lengths import require_positions

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PER_HEAD = [1.0] * 8
"""Of heads of 16."""


@pytest.mark.parametrize("setting", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"kind": "default"}, 4096),
        ({"kind": "linear", "factor": 2.0}, 8192),
        ({"kind": "dynamic", "factor": 4.0}, 16384),
        ({"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"kind": "yarn", "factor": 2.5}, 10240),
        # As DeepSeek and gpt-oss have it: the number after scaling stands there already.
        ({"kind": "yarn", "factor": 32.0, "original_max_position_embeddings": 128}, 4096),
        ({"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"kind": "yarn", "factor": None, "original_max_position_embeddings": 1024}, 4096),
        ({"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 512, **LLAMA3}, 4096),
        (
            {
                "kind": "longrope", "factor": 8.0, "original_max_position_embeddings": 512,
                "short_factor": PER_HEAD, "long_factor": PER_HEAD,
            },
            4096,
        ),
    ],
)  # fmt: skip
def test_positions_with_scaled_rope(setting: str, name: str, scaling: dict[str, Any], expected: int) -> None:
    written = {name if key == "kind" else key: value for key, value in scaling.items()}
    config = LlamaConfig(
        max_position_embeddings=4096, hidden_size=64, num_attention_heads=4, **{setting: written}
    )
    assert positions(config) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Configs of a model's own code, which transformers does not bring into its form.
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "su", "factor": 32.0}}, 4096),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4096),
        ({"rope_scaling": None}, 4096),
        ({"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
    ],
)
def test_positions_of_a_config_of_another_form(settings: dict[str, Any], expected: int) -> None:
    config = PretrainedConfig()
    for name, value in ({"max_position_embeddings": 4096} | settings).items():
        setattr(config, name, value)
    assert positions(config) == expected


def test_positions_of_layers_of_several_kinds() -> None:
    config = Gemma3TextConfig(
        max_position_embeddings=4096,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert positions(config) == 4096


def test_positions_without_rope() -> None:
    assert positions(OPTConfig(max_position_embeddings=2048)) == 2048
    assert positions(GPT2Config(n_positions=512)) == 512
    assert positions(BloomConfig()) is None


def test_what_training_takes_serving_takes_too() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, rope_scaling={"rope_type": "linear", "factor": 2.0},
    )  # fmt: skip
    model = VisionLanguageModel(LlamaForCausalLM(config), torch.nn.Linear(4, 16))
    assert model.context == 256
    require_positions(config, 256)
    with pytest.raises(RecipeError, match=r"has 256 positions[\s\S]*set conversation\.max_tokens=256"):
        require_positions(config, 257)
