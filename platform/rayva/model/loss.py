"""The language-modelling loss over supervised positions, without logits of the whole batch.

Shapes: S supervised positions, C those of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
"""Logits that exist at the same time, in elements, by device: 64 MiB in fp32, and 256 MiB."""


def cross_entropy_sum(hidden_SH: Tensor, targets_S: Tensor, head: nn.Module) -> Tensor:
    """Sum over positions of -log p(target), softmax in fp32; `head` makes logits of hidden states.

    The gradient of each chunk is taken while its logits exist, so that they are computed once. A head of
    another kind than `nn.Linear` goes through autograd, which computes each chunk's logits again.
    """
    if type(head) is nn.Linear:
        with _computing_loss(head):
            # As a module's call: ZeRO 3 gathers the weight around it, once, however many chunks a rank has.
            return head(hidden_SH, targets_S)  # type: ignore[no-any-return]
    total = hidden_SH.new_zeros((), dtype=torch.float32)  # keeps the sum in fp32 from the first chunk on
    chunk = _chunk(cast(Tensor, head.weight))
    for start in range(0, max(1, len(targets_S)), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_chunk_loss, hidden_SH[part], targets_S[part], head, use_reentrant=False)
    return total


@contextmanager
def _computing_loss(head: nn.Linear) -> Iterator[None]:
    """`head(hidden_SH, targets_S)` is the loss meanwhile."""

    def forward(hidden_SH: Tensor, targets_S: Tensor) -> Tensor:
        fused = _fused_kernel() if hidden_SH.is_cuda and len(targets_S) else None
        if fused is not None:
            # Sums in fp32, as below: many chunks add up in the weight's gradient.
            accumulate = torch.float32 if head.weight.requires_grad else None
            loss = fused(
                hidden_SH, head.weight, targets_S, bias=head.bias, reduction="sum", accum_dtype=accumulate
            )
            return cast(Tensor, loss)
        applied = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
            hidden_SH, head.weight, head.bias, targets_S
        )
        return cast(Tensor, applied)

    before = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


@functools.lru_cache(maxsize=1)
def _fused_kernel() -> Callable[..., Any] | None:
    """Liger's, where it is installed (extra `gpu`): faster on a GPU, in less memory (docs/benchmarks.md)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return cast("Callable[..., Any]", liger_fused_linear_cross_entropy)


def _chunk(weight_VH: Tensor) -> int:
    return max(1, _LOGITS_AT_ONCE[weight_VH.device.type] // len(weight_VH))


def _chunk_loss(hidden_CH: Tensor, targets_C: Tensor, head: nn.Module) -> Tensor:
    return functional.cross_entropy(head(hidden_CH).float(), targets_C, reduction="sum")


class _CrossEntropySum(torch.autograd.Function):
    """Keeps the gradients [S, H] and, where the head is trained, [V, H] and [V] in place of logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_S: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        total = hidden_SH.new_zeros((), dtype=torch.float32)
        grad_SH = torch.empty_like(hidden_SH) if wanted[0] else None
        # In fp32: many chunks add up in them.
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted[1] else None
        grad_V = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if wanted[2] else None
        chunk = _chunk(weight_VH)
        for start in range(0, len(targets_S), chunk):
            part = slice(start, start + chunk)
            logits_CV = functional.linear(hidden_SH[part], weight_VH, bias_V).float()
            loss, grad_CV = _loss_and_gradient(logits_CV, targets_S[part].unsqueeze(1))
            total += loss
            half_CV = grad_CV.to(hidden_SH.dtype)
            if grad_SH is not None:
                torch.mm(half_CV, weight_VH, out=grad_SH[part])
            if grad_VH is not None:
                grad_VH += half_CV.T @ hidden_SH[part]
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        ctx.save_for_backward(grad_SH, grad_VH, grad_V)
        ctx.dtype = weight_VH.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if kept is None else (kept * grad).to(ctx.dtype) for kept in ctx.saved_tensors]
        return (*scaled, None)


def _loss_and_gradient(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """The loss summed, and its gradient [C, V], which takes the place of the logits."""
    logsum_C1 = logits_CV.logsumexp(1, keepdim=True)
    loss = (logsum_C1 - logits_CV.gather(1, targets_C1)).sum()
    grad_CV = logits_CV.sub_(logsum_C1).exp_()  # softmax, less one at the target
    return loss, grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
