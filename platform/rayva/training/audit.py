"""Proof by counting: a plan's batches hold what it promises.

It looks at nothing but the batches and the sizes and weights of the datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rayva.training.plan import Int64, Part, TrainingPlan


@dataclass(frozen=True, slots=True)
class EpochAudit:
    """One epoch counted: `visits` by dataset, and what is wrong (nothing, if all is well)."""

    epoch: int
    steps: int
    visits: dict[str, int]
    faults: list[str]


def audit(plan: TrainingPlan, advance: Callable[[int], None] = lambda steps: None) -> list[EpochAudit]:
    """Goes through all steps of the plan; takes sixteen bytes a sample.

    After every whole epoch each sample of a dataset has been visited as often as any other of it, or once
    less: every pass is exactly-once. The epoch's visits of a dataset are weight x samples. A fractional
    last epoch may only be short of that. `advance` is told after each step.
    """
    parts = plan.parts or (Part("", plan.num_samples),)
    totals = np.zeros(plan.num_samples, dtype=np.int64)
    found: list[EpochAudit] = []
    done = 0
    while done < plan.steps_total:
        epoch = plan.epoch_of(done)
        before = totals.copy()
        stop = min(done + plan.steps_per_epoch, plan.steps_total)
        for step in range(done, stop):
            # Adds one for each time that an index occurs, also where a batch holds a sample twice.
            np.add.at(totals, plan.global_batch(step), 1)
            advance(1)
        whole = (epoch + 1) * plan.samples_per_epoch <= plan.samples_total
        found.append(_count(parts, epoch, stop - done, totals, totals - before, whole))
        done = stop
    return found


def _count(
    parts: tuple[Part, ...],
    epoch: int,
    steps: int,
    totals: Int64,
    now: Int64,
    whole: bool,
) -> EpochAudit:
    visits: dict[str, int] = {}
    faults: list[str] = []
    start = 0
    for part in parts:
        own = slice(start, start + part.samples)
        start += part.samples
        visits[part.name] = int(now[own].sum())
        # Visits are numbered through all epochs; a sample has its n-th in pass n.
        most = -(-((epoch + 1) * part.visits) // part.samples)
        least = (epoch + whole) * part.visits // part.samples
        who = f"dataset {part.name}: " if part.name else ""
        if whole and visits[part.name] != part.visits:
            faults.append(f"{who}{visits[part.name]} visits instead of {part.visits}")
        wrong = (totals[own] < least) | (totals[own] > most)
        if wrong.any():
            faults.append(
                f"{who}{int(wrong.sum())} samples were not visited {least} to {most} times by then, for "
                f"example number {int(np.flatnonzero(wrong)[0])}"
            )
    return EpochAudit(epoch, steps, visits, faults)
