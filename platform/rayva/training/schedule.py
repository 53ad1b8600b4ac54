"""The learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def lr_factor(
    step: int, steps_total: int, warmup_ratio: float, schedule: Literal["cosine", "constant"]
) -> float:
    """What learning rates are multiplied with in `step` (from 0): linear warm-up, then cosine or constant.

    The same as Hugging Face's schedules, which the original trained with: step 0 of a warm-up has 0. But the
    last step is never one of the warm-up: a stage of one step would train nothing.
    """
    warmup = min(math.ceil(steps_total * warmup_ratio), steps_total - 1)
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps_total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
