"""The learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def lr_factor(
    step: int, steps_total: int, warmup_ratio: float, schedule: Literal["cosine", "constant"]
) -> float:
    """What learning rates are multiplied with in `step` (from 0): linear warm-up, then cosine or constant.

    The same as Hugging Face's schedules, which the original trained with: step 0 of a warm-up has 0.
    """
    warmup = math.ceil(steps_total * warmup_ratio)
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps_total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
