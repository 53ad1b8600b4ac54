"""The promotion gate: right often enough, and the image is why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayva.recipes.schema import Evaluation

_SLACK = 1e-9
"""So that 0.9 - 0.7 is a margin of 0.2."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the model is promoted, and why in one sentence."""

    passed: bool
    why: str


def decide(figures: Mapping[str, Any], evaluation: Evaluation) -> Decision:
    """Promotes a model that reaches `min_accuracy` and beats both wrong and missing images by `min_margin`.

    Args:
        figures: of `rayva.evaluation.metrics.grounding_figures`.
    """
    if not figures["questions"]:
        return Decision(False, "No held-out question about an image could be asked, so nothing is proven.")
    accuracy: float = figures["accuracy"]
    if accuracy + _SLACK < evaluation.min_accuracy:
        needed = evaluation.min_accuracy
        return Decision(False, f"Only {accuracy:.1%} of the answers are right; promotion takes {needed:.1%}.")
    others = {
        "with another question's image": float(figures["accuracy_shuffled_images"]),
        "without image": float(figures["accuracy_no_image"]),
    }
    where, highest = max(others.items(), key=lambda item: item[1])
    margin = 100 * (accuracy - highest)
    if accuracy - highest + _SLACK < evaluation.min_margin:
        return Decision(
            False,
            f"{accuracy:.1%} of the answers are right, but so are {highest:.1%} {where}: the image "
            f"accounts for {margin:.1f} points, and promotion takes {100 * evaluation.min_margin:.1f}.",
        )
    return Decision(
        True,
        f"{accuracy:.1%} of the answers are right, {margin:.1f} points more than {where}: the model looks.",
    )
