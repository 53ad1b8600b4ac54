"""What every task is made of: items that are asked, answers, and figures with their parts.

Every figure is a ratio of two sums over questions: accuracy is right answers over questions, the relative
score of LLaVA-Bench is the candidate's points over the reference's, F1 is twice the true positives over
predicted and actual positives. Keeping numerator and denominator of each question is what makes paired
bootstrap intervals of any of them possible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AfterValidator

from rayva.data.locations import absolute
from rayva.recipes.schema import Config
from rayva.text.conversation import IMAGE, Message

PRECISION = 4
"""Decimals of figures in JSON."""

Place = Annotated[str, AfterValidator(absolute)]
"""A path or URI as a setting. Paths are made absolute: they are written down, and read again elsewhere."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of an item: a path or URI, or the encoded bytes. `name` tells it from others."""

    name: str
    uri: str | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is asked.

    Attributes:
        item_id: unique within the task.
        question_id: what several items of one question share (the three conditions of grounding).
        messages: the conversation up to the question; its image slots are filled by `pictures` in order.
        facts: what scoring and reports need, as JSON data.
        then: what is put behind the first answer for the model to go on from, where the answer does not
            hold it already (the two-step prompt of ScienceQA's QCM-LEPA).
    """

    item_id: str
    question_id: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    then: str = ""

    @property
    def prompt(self) -> str:
        """The conversation for people to read and for digests; images as `<image>`."""
        return json.dumps(prompt_rows(self.messages), ensure_ascii=False)

    @property
    def question(self) -> str:
        """The last message's text."""
        return self.messages[-1].text.strip()


def prompt_rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as JSON data, images as `<image>`."""
    return [
        {"role": m.role, "content": "".join(p if isinstance(p, str) else "<image>" for p in m.content)}
        for m in messages
    ]


def ask(text: str, images: int = 0, position: str = "front") -> Message:
    """A question with its images on lines of their own, before or after the text."""
    slots: list[Any] = []
    for _ in range(images):
        slots += [IMAGE, "\n"] if position == "front" else ["\n", IMAGE]
    content = [*slots, text] if position == "front" else [text, *slots]
    return Message("user", tuple(part for part in content if part != ""))


@dataclass(frozen=True, slots=True)
class Scored:
    """One question with the parts of its figures.

    Attributes:
        parts: numerator and denominator by figure, one pair for each run (of a judge); a pair of zeros
            takes no part in the figure.
        group: for breakdowns (category, subject, condition).
    """

    question_id: str
    question: str
    answer: str
    reference: str
    parts: Mapping[str, Sequence[tuple[float, float]]]
    group: str = ""
    picture: str | None = None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "question_id": self.question_id,
            "group": self.group,
            "question": self.question,
            "answer": self.answer,
            "reference": self.reference,
            "picture": self.picture,
            "note": self.note,
            "parts": {name: [list(pair) for pair in pairs] for name, pairs in self.parts.items()},
        }


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of a task (JSON data) and the questions behind them."""

    figures: dict[str, Any]
    rows: list[Scored]


class Task(Protocol):
    """A task with its settings; `read` may be called in any process that sees the data."""

    name: ClassVar[str]

    @property
    def settings(self) -> TaskSettings: ...

    def read(self) -> list[Item]:
        """All items, in the data's order.

        Raises:
            DataError: the data is missing or cannot be used.
        """
        ...

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """Figures of the answers (text by item id); items without an answer are left out and counted."""
        ...


class TaskSettings(Config):
    """What all tasks can be told."""

    max_new_tokens: int = 32
    """Longest answer in tokens."""


def percent(part: float, whole: float) -> float | None:
    """100 * part / whole, rounded for JSON; None of nothing."""
    return round(100 * part / whole, PRECISION) if whole else None


def digest(value: Any) -> str:
    """sha256 (hex) of JSON data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
