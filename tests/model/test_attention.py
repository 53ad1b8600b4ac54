"""Samples one behind the other in one row see themselves alone: as in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rayva.model import attention
from rayva.model.attention import isolate_samples, sample_borders
from rayva.model.batch import Row, collate, collate_flat, collate_packed
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IMAGE_TOKEN_INDEX

VISION, VOCABULARY, SHAPE = 5, 60, {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY}


def _llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, **changes))


def _rows() -> list[Row]:
    """Two images, text alone, one image, and a sample that was cut within its image."""
    rng = torch.Generator().manual_seed(1)
    rows = []
    for images, text in ((2, 9), (0, 5), (1, 14), (1, 0), (0, 1)):
        ids = torch.randint(3, VOCABULARY, (text,), generator=rng).tolist()
        places = [IMAGE_TOKEN_INDEX] * (3 * images)
        features = torch.randn(3 * images, VISION, generator=rng) if images else None
        rows.append(Row(places + ids, [-100] * len(places) + ids, features))
    return rows


def _loss(language: PreTrainedModel, layout: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)
    model = VisionLanguageModel(language, torch.nn.Linear(VISION, 32))
    rows = _rows()
    batches = {
        "flat": lambda: [collate_flat(rows, VISION)],
        "rows": lambda: [collate_packed([rows[:2], rows[2:]], VISION)],
        "alone": lambda: [collate([row], VISION) for row in rows],
    }[layout]()
    sums = [model.loss_sum(batch)[0] for batch in batches]
    total = torch.stack(sums).sum()
    return total, list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flat_row_equals_samples_alone(checkpointing: bool) -> None:
    expected, wanted = _loss(_llama(), "alone")
    packed, _ = _loss(_llama(), "rows")  # transformers' block mask
    language = _llama()
    if checkpointing:
        language.gradient_checkpointing_enable({"use_reentrant": False})
        language.train()
    assert isolate_samples(language)
    flat, gradients = _loss(language, "flat")
    torch.testing.assert_close(flat, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize(("heads", "shared"), [(6, 3), (4, 1)])
@pytest.mark.parametrize("lengths", [[1, 7, 30], [192, 191, 193], [128, 320, 449], [1449, 5]])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"]
)
def test_every_sample_is_attended_to_as_torch_does_in_double_precision(
    dtype: torch.dtype, tolerance: float, lengths: list[int], heads: int, shared: int, scaling: float | None
) -> None:
    """Values and gradients, at the lengths where the way of computing changes."""
    torch.manual_seed(0)
    total = sum(lengths)
    whole = [torch.randn(1, n, total, 16) for n in (heads, heads // shared, heads // shared)]
    borders = sample_borders(lengths, torch.device("cpu"))
    upstream = torch.randn(1, total, heads, 16)

    inputs = [x.to(dtype).requires_grad_() for x in whole]
    out, _ = attention._attend(torch.nn.Module(), *inputs, None, scaling=scaling, **borders)
    found = [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    exact = [x.double().requires_grad_() for x in whole]
    parts = zip(*(torch.split(x, lengths, dim=2) for x in exact), strict=True)
    alone = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts
    ]
    expected = torch.cat(alone, dim=2).transpose(1, 2)
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for one, reference in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), reference, atol=tolerance, rtol=tolerance)


def test_prepared_models_compute_padded_batches_as_before() -> None:
    rows, language = _rows(), _llama()
    model = VisionLanguageModel(language, torch.nn.Linear(VISION, 32))
    before = model.loss_sum(collate(rows, VISION))[0]
    assert isolate_samples(language)
    torch.testing.assert_close(model.loss_sum(collate(rows, VISION))[0], before, rtol=1e-6, atol=0)


def test_other_models_whose_layers_are_plain_are_prepared_too() -> None:
    torch.manual_seed(0)
    language = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS))
    expected, _ = _loss(language, "alone")
    assert isolate_samples(language)
    torch.testing.assert_close(_loss(language, "flat")[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "language",
    [
        lambda: MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=8)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **HEADS, sliding_window=8)),
        lambda: _llama(attention_dropout=0.1),
        lambda: _llama(attn_implementation="eager"),
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.1)),
    ],
    ids=["window", "mixed", "dropout", "eager", "gpt2"],
)
def test_models_with_other_attention_are_left_alone(language: Any) -> None:
    model = language()
    before = model.config._attn_implementation
    assert not isolate_samples(model)
    assert model.config._attn_implementation == before
