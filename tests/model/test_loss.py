"""The loss in chunks: its value, its gradients, and what it never holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from rayva.model import loss
from rayva.model.loss import cross_entropy_sum

POSITIONS, HIDDEN, VOCABULARY, AT_ONCE = 23, 8, 50, 4


class _OtherHead(nn.Linear):
    """Not `nn.Linear` itself: goes through autograd."""


class _Watch(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.shapes.add(tuple(made.shape))
        return made


@contextmanager
def _watch() -> Iterator[set[tuple[int, ...]]]:
    with _Watch() as watch:
        yield watch.shapes


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss._LOGITS_AT_ONCE, "cpu", AT_ONCE * VOCABULARY + 1)


def _inputs(dtype: torch.dtype, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(0, VOCABULARY, (positions,), generator=generator)


@pytest.mark.parametrize("kind", [nn.Linear, _OtherHead])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_cross_entropy_of_all_logits(kind: type[nn.Linear], bias: bool) -> None:
    torch.manual_seed(1)
    head = kind(HIDDEN, VOCABULARY, bias=bias)
    hidden, targets = _inputs(torch.float32)
    wanted = [hidden, *head.parameters()]
    full = functional.cross_entropy(head(hidden), targets, reduction="sum")
    expected = torch.autograd.grad(full / 7, wanted)
    with _watch() as shapes:
        total = cross_entropy_sum(hidden, targets, head)
        gradients = torch.autograd.grad(total / 7, wanted)
    torch.testing.assert_close(total, full)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    of_logits = {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == VOCABULARY}
    assert max(of_logits - {HIDDEN}) == AT_ONCE
    assert "forward" not in head.__dict__


def test_a_frozen_head_has_no_gradient_and_no_room_for_one() -> None:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    hidden, targets = _inputs(torch.float32)
    with _watch() as shapes:
        cross_entropy_sum(hidden, targets, head).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert (VOCABULARY, HIDDEN) not in shapes


@pytest.mark.parametrize("kind", [nn.Linear, _OtherHead])
def test_no_position_gives_a_loss_and_gradients_of_zero(kind: type[nn.Linear]) -> None:
    head = kind(HIDDEN, VOCABULARY, bias=False)
    hidden, targets = _inputs(torch.float32, positions=0)
    total = cross_entropy_sum(hidden, targets, head)
    assert total.item() == 0
    total.backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_in_bf16_the_softmax_and_the_sum_are_in_fp32() -> None:
    """The only rounding is that of the logits: no more than a part in 2**8 of each."""
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, targets = _inputs(torch.bfloat16)
    low = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(torch.bfloat16)
    low.load_state_dict(head.state_dict())
    total = cross_entropy_sum(hidden, targets, low)
    logits = functional.linear(hidden, low.weight).float()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, functional.cross_entropy(logits, targets, reduction="sum"))
    exact = functional.cross_entropy(
        functional.linear(hidden.float(), low.weight.float()), targets, reduction="sum"
    )
    wanted = torch.autograd.grad(exact, [hidden, low.weight])
    for gradient, reference in zip(torch.autograd.grad(total, [hidden, low.weight]), wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), reference.float(), rtol=0.02, atol=0.02)
