"""Which samples are to be written: a kind and a context each, in the proportions of the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rayva.errors import RecipeError
from rayva.instruct.contexts import Context, Kind

KINDS: tuple[Kind, ...] = ("conversation", "detail", "reasoning")


@dataclass(frozen=True)
class Task:
    """One sample to be written. `repeat` counts the samples of a kind about one context, from 0."""

    kind: Kind
    repeat: int
    context: Context

    @property
    def task_id(self) -> str:
        """Unique within a run, and the id of the sample."""
        suffix = f"-{self.repeat}" if self.repeat else ""
        return f"{self.context.id}-{self.kind}{suffix}"


def counts_of(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided by `shares`: whole numbers that add up to it (largest remainders).

    Raises:
        RecipeError: the shares are no proportions.
    """
    if min(shares) < 0 or sum(shares) <= 0:
        raise RecipeError(
            f"generation.kinds={list(shares)} are no proportions", "give numbers such as 58,23,77"
        )
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def plan_tasks(
    contexts: Sequence[Context], shares: Sequence[float], samples: int | None, seed: int
) -> list[Task]:
    """The tasks of a run, a pure function of its arguments.

    Each kind goes round the contexts in an order of its own, so that no context has two samples of a kind
    before every other one has as many.

    Args:
        shares: of the kinds, in the order of `KINDS`.
        samples: how many in all; None takes as many for each context as there are kinds.
    """
    total = len(KINDS) * len(contexts) if samples is None else samples
    tasks = []
    for kind, count in zip(KINDS, counts_of(total, shares), strict=True):
        order = sorted(contexts, key=lambda c: hashlib.sha256(f"{seed}/{kind}/{c.id}".encode()).digest())
        for number in range(count):
            repeat, position = divmod(number, len(order))
            tasks.append(Task(kind, repeat, order[position]))
    # Kinds are mixed, so that a run that stops early has some of each.
    return sorted(tasks, key=lambda t: hashlib.sha256(f"{seed}/{t.task_id}".encode()).digest())
