"""Text lengths like those of LLaVA's data, from seeded distributions. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune")
TITLES: dict[StageName, str] = {
    "pretrain": "Stage 1 (projector)",
    "finetune": "Stage 2 (projector and language model)",
}
TEXT_LENGTHS: dict[StageName, tuple[float, float]] = {"pretrain": (18.0, 0.5), "finetune": (220.0, 0.65)}
"""Median of the text tokens of a sample, and sigma of their logarithm."""


def quantile_lengths(stage: StageName, count: int, scale: float = 1.0) -> list[int]:
    """Text tokens of `count` samples, ascending: the distribution's quantiles at (i + 1/2) / count."""
    median, sigma = TEXT_LENGTHS[stage]
    normal = statistics.NormalDist()
    raw = (median * math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [max(6, round(length * scale)) for length in raw]


def describe_lengths(lengths: Sequence[int]) -> str:
    """Mean and quantiles of sample lengths, in words."""
    ordered = sorted(lengths)
    p10, p50, p90 = (ordered[min(len(ordered) - 1, len(ordered) * tenth // 10)] for tenth in (1, 5, 9))
    quantiles = f"p10 {p10}, p50 {p50}, p90 {p90}, max {ordered[-1]}"
    return f"mean {sum(ordered) / len(ordered):.0f} tokens ({quantiles})"
