"""What is asked: each held-out question with its image, with another one, and with none.

A model that looks answers only the first rightly. One that has learned the usual answers gives them
whatever it is shown, and is right about as often with a wrong image, or with none.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rayva.data.schema import Question
from rayva.text.conversation import IMAGE, Message

Condition = Literal["right_image", "shuffled_images", "no_image"]
CONDITIONS: tuple[Condition, ...] = ("right_image", "shuffled_images", "no_image")
GATE_TASK = "grounding"


@dataclass(frozen=True, slots=True)
class Ask:
    """One question under one condition; `image_id` is what is shown."""

    question: Question
    condition: Condition
    image_id: str | None

    def messages(self) -> list[Message]:
        """The conversation: the image on a line of its own, then the question. No slot without image."""
        text = self.question.question
        return [Message("user", (IMAGE, f"\n{text}") if self.image_id is not None else (text,))]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is asked, and how many questions are left out for which reason."""

    asks: list[Ask]
    left_out: dict[str, int]


def plan_asks(
    questions: Iterable[Question], image_keys: Mapping[str, str], max_questions: int | None, seed: int
) -> Plan:
    """Every question under every condition; questions without image once, as they are.

    Args:
        image_keys: content key of each usable image, by image id.
        max_questions: keeps only that many of each task, drawn with `seed`.
    """
    tasks: dict[str, list[Question]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for question in questions:
        if question.image_id and question.image_id not in image_keys:
            left_out["image_quarantined"] += 1
        else:
            tasks[question.task].append(question)
    asks: list[Ask] = []
    for task, members in tasks.items():
        members.sort(key=lambda question: _draw(seed, question.question_id))
        kept = members[:max_questions]
        left_out["over_max_questions"] += len(members) - len(kept)
        asks += _ask_task(kept, image_keys, f"{seed}/{task}")
    return Plan(asks, {reason: count for reason, count in left_out.items() if count})


def _draw(seed: int, question_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{question_id}".encode()).digest()


def _ask_task(questions: Sequence[Question], image_keys: Mapping[str, str], seed: str) -> Iterable[Ask]:
    shown = {question.image_id: image_keys[question.image_id] for question in questions if question.image_id}
    other = derange(shown, seed)
    for question in questions:
        if question.image_id:
            yield Ask(question, "right_image", question.image_id)
            yield Ask(question, "shuffled_images", other[question.image_id])
        yield Ask(question, "no_image", None)


def derange(image_keys: Mapping[str, str], seed: str) -> dict[str, str]:
    """For each image another one with other content, drawn with `seed`.

    Images are put in a circle in random order and each gets its neighbour, so that each is used equally
    often. Where all images are the same there is no other one: each gets itself.

    Args:
        image_keys: content key by image id; images with equal keys count as one.
    """
    first = {key: image_id for image_id, key in sorted(image_keys.items(), reverse=True)}
    circle = sorted(first)
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return {
        image_id: first[following[key]] if len(circle) > 1 else image_id
        for image_id, key in image_keys.items()
    }


def batches(asks: Sequence[Ask], size: int) -> list[list[Ask]]:
    """Batches of asks of about the same length: little padding, and the same batches at every start."""
    ordered = sorted(
        asks,
        key=lambda ask: (
            ask.image_id is None, len(ask.question.question), ask.question.question_id, ask.condition
        ),
    )  # fmt: skip
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
