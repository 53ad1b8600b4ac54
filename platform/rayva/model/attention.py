"""Attention of samples that stand one behind the other in one row: each sees itself alone.

Rows without padding and without a block mask: what attention costs is the sum of the samples' squares,
not the square of the row. A kind of attention for transformers, which hands the samples' borders through
to it under the names that its flash attention takes.

Shapes: B rows (one), A heads, K key and value heads, S = A / K x T, T positions, D head size, N samples.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rayva_isolated"
_OTHER_SETTINGS = ("attn_logit_softcapping", "attention_chunk_size", "attention_dropout", "attn_pdrop")
_BLOCK = 128
"""Queries whose scores are one product on a CPU; they leave out the keys behind them."""
_PRODUCTS = {torch.bfloat16: range(1449), torch.float32: range(192, 725)}
"""Lengths for which they are faster on CPUs, and a head's scores, which the backward pass needs, not too
large: 2 MiB in bf16, 1 MiB in fp32."""
_FLASH_CAPABILITY = 8
"""Compute capability (major) from which torch's variable-length kernel works."""


def isolate_samples(language: PreTrainedModel) -> bool:
    """Makes a language model take samples without padding (`sample_borders`), if its attention allows that.

    It does where every layer is plain causal attention behind transformers' interface. Without borders
    the model then computes causal attention over each row, and takes no mask.
    """
    config = language.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # Windows, chunks, capped scores and dropout inside attention, where a model has them, are not done here.
    others = [window, *(getattr(config, name, None) for name in _OTHER_SETTINGS)]
    plain = (
        bool(getattr(language, "_supports_attention_backend", False))
        and config._attn_implementation in {"sdpa", NAME}
        and kinds == {"full_attention"}
        and not any(others)
    )
    if plain:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        language.set_attn_implementation(NAME)
    return plain


def sample_borders(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the model: where the samples of the one row begin and end."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths), 0, out=starts[1:])
    starts, longest = starts.to(device, non_blocking=True), max(lengths)
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _attend(
    module: nn.Module,
    query_BATD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]  # transformers is not typed
            module, query_BATD, key_BKTD, value_BKTD, attention_mask, dropout, scaling, **others
        )
    grouped = query_BATD.shape[1] != key_BKTD.shape[1]
    if _has_kernel(query_BATD, value_BKTD):
        return _varlen(query_BATD, key_BKTD, value_BKTD, cu_seq_lens_q, max_length_q, scaling, grouped), None
    return _attend_each(query_BATD, key_BKTD, value_BKTD, cu_seq_lens_q, scaling, grouped), None


# Lengths differ from batch to batch: it would be compiled for each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_each(
    query_BATD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, starts: Tensor, scaling: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    """Each sample by itself: [B, T, A, D]."""
    lengths = starts.diff().tolist()
    # Split, not sliced: the gradients of slices would each be as large as the row.
    parts = (torch.split(x, lengths, dim=2) for x in (query_BATD, key_BKTD, value_BKTD))
    attended = [
        _attend_one(query, key, value, scaling, grouped) for query, key, value in zip(*parts, strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_one(
    query_BATD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, scaling: float | None, grouped: bool
) -> Tensor:
    """Causal attention of one sample: [B, A, T, D]."""
    if not query_BATD.is_cuda and query_BATD.shape[2] in _PRODUCTS.get(query_BATD.dtype, ()):
        return _by_products(query_BATD, key_BKTD, value_BKTD, scaling)
    return scaled_dot_product_attention(
        query_BATD, key_BKTD, value_BKTD, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def _by_products(query_BATD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, scaling: float | None) -> Tensor:
    """The same, as two matrix products for each block of queries: faster on CPUs than torch's fused kernel.

    Scores are kept in the precision of the queries, as in transformers' eager attention; the softmax sums in
    fp32. Query heads that share a key head stand behind one another in one product.
    """
    _, heads, length, size = query_BATD.shape
    key_heads = key_BKTD.shape[1]
    scaled = query_BATD * (size**-0.5 if scaling is None else scaling)
    grouped_KSTD = scaled.reshape(key_heads, heads // key_heads, length, size)
    mixed = []
    for start, end in _blocks(length):
        mask_ST = _causal_mask(start, end, heads // key_heads, query_BATD.dtype)
        block_KSD = grouped_KSTD[:, :, start:end].reshape(key_heads, -1, size)
        scores_KST = torch.baddbmm(mask_ST, block_KSD, key_BKTD[0, :, :end].transpose(1, 2))
        mixed_KSD = scores_KST.softmax(-1) @ value_BKTD[0, :, :end]
        mixed.append(mixed_KSD.view(1, heads, end - start, -1))  # values may be of another size
    return torch.cat(mixed, dim=2)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Beginnings and ends; a rest of less than half a block goes with the last one."""
    count = max(1, round(length / _BLOCK))
    return [(i * _BLOCK, (i + 1) * _BLOCK if i + 1 < count else length) for i in range(count)]


@functools.lru_cache(maxsize=64)
def _causal_mask(start: int, end: int, shared: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of these queries, `shared` times behind one another: [S, end]."""
    return torch.full((end - start, end), -torch.inf, dtype=dtype).triu(start + 1).repeat(shared, 1)


def _has_kernel(query_BATD: Tensor, value_BKTD: Tensor) -> bool:
    return (
        query_BATD.is_cuda
        and value_BKTD.shape[-1] == query_BATD.shape[-1]
        and query_BATD.dtype in {torch.bfloat16, torch.float16}
        and torch.cuda.get_device_capability(query_BATD.device)[0] >= _FLASH_CAPABILITY
    )


def _varlen(
    query_BATD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, starts: Tensor, longest: int,
    scaling: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """All samples in one call of torch's variable-length flash kernel: [B, T, A, D]."""
    from torch.nn.attention.varlen import varlen_attn

    query_TAD, key_TKD, value_TKD = (x.squeeze(0).transpose(0, 1) for x in (query_BATD, key_BKTD, value_BKTD))
    out_TAD = varlen_attn(
        query_TAD, key_TKD, value_TKD, starts, starts, longest, longest,
        scale=scaling, window_size=(-1, 0), **(_grouped_heads() if grouped else {}),
    )  # fmt: skip
    assert isinstance(out_TAD, Tensor)  # a tuple only where more is asked for
    return out_TAD.unsqueeze(0)


@functools.lru_cache(maxsize=1)
def _grouped_heads() -> dict[str, Any]:
    """The argument that allows fewer key heads; torch 2.11, which a GPU's driver may ask for, needs none."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
