"""Answers, and the figures made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayva.evaluation.grounding import CONDITIONS, GATE_TASK, Ask, Condition
from rayva.evaluation.score import is_right, wilson

ANSWERS = pa.schema(
    [
        ("question_id", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("condition", pa.string()),
        ("image_id", pa.string()),  # what was shown; null without image
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("accepted", pa.list_(pa.string())),
        ("correct", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    ask: Ask
    text: str

    @property
    def correct(self) -> bool:
        question = self.ask.question
        return is_right(self.text, question.accepted, question.match)

    def row(self) -> dict[str, Any]:
        """One row of `ANSWERS`."""
        question = self.ask.question
        return {
            "question_id": question.question_id,
            "task": question.task,
            "kind": question.kind,
            "condition": self.ask.condition,
            "image_id": self.ask.image_id,
            "prompt": question.question,
            "answer": self.text,
            "accepted": list(question.accepted),
            "correct": self.correct,
        }


@dataclass(slots=True)
class Tally:
    """Right answers out of all."""

    right: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 of nothing."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson(self.right, self.total)


Group = dict[Condition, Tally]


def tally(answers: Iterable[Answer], by: str) -> dict[str, Group]:
    """Counts by "task" or "kind" of the question, and by condition."""
    groups: dict[str, Group] = defaultdict(dict)
    for answer in answers:
        group = groups[getattr(answer.ask.question, by)]
        count = group.setdefault(answer.ask.condition, Tally())
        count.right += answer.correct
        count.total += 1
    return dict(sorted(groups.items()))


def grounding_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of the gate's task, under the names that summary.json uses."""
    group = tally((a for a in answers if a.ask.question.task == GATE_TASK), "task").get(GATE_TASK, {})
    right, shuffled, none = (group.get(condition, Tally()) for condition in CONDITIONS)
    return {
        "accuracy": right.accuracy,
        "accuracy_shuffled_images": shuffled.accuracy,
        "accuracy_no_image": none.accuracy,
        "questions": right.total,
        "interval": list(right.interval),
    }


def accuracies(groups: Mapping[str, Group]) -> dict[str, dict[str, float]]:
    """JSON data: {group: {condition: accuracy, "questions": count}}."""
    return {
        name: {
            **{condition: count.accuracy for condition, count in group.items()},
            "questions": max(count.total for count in group.values()),
        }
        for name, group in groups.items()
    }
