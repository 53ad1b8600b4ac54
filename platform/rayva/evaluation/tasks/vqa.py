"""Short answers compared word by word, on any LLaVA JSON.

Every question of a conversation is asked, later ones with the reference answers before them. An answer is
right if it is the reference's, but for case, punctuation and articles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rayva.data.json_rows import read_json_rows
from rayva.data.llava_json import parse_row
from rayva.data.locations import join, parent
from rayva.data.quarantine import BadRow
from rayva.data.splits import UniqueIds
from rayva.errors import DataError
from rayva.evaluation.score import MINUS, is_right, normalise
from rayva.evaluation.tasks.base import Item, Picture, Place, Result, Scored, TaskSettings, percent
from rayva.text.conversation import Message, messages_from_turns


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """One question of a conversation, with all that comes before it."""

    question_id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    reference: str


def read_questions(data: str, first_only: bool = False) -> tuple[list[VqaQuestion], dict[str, int]]:
    """The questions of a LLaVA JSON file, and how many of its rows cannot be used, by reason.

    The first question of a row has the row's id, later ones ID/2, ID/3, ...

    Raises:
        DataError: the file is missing or not JSON, or no row can be used.
    """
    questions: list[VqaQuestion] = []
    left_out: Counter[str] = Counter()
    ids = UniqueIds()
    for row in read_json_rows(data, "vqa.data"):
        try:
            if row.error:
                raise BadRow("not_json", row.error)
            questions += _questions(ids, row.index, row.value, first_only)
        except BadRow as error:
            left_out[error.reason] += 1
    if not questions:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "it has no rows"
        raise DataError(f"{data} has no row that can be asked ({reasons})", "give LLaVA JSON (docs/data.md)")
    return questions, dict(left_out)


def _questions(ids: UniqueIds, index: int, value: object, first_only: bool) -> Iterator[VqaQuestion]:
    parsed = parse_row(value)
    name = ids.claim(parsed.row_id or f"row-{index}")
    messages = messages_from_turns(parsed.turns, len(parsed.images))
    for turn in range(0, len(messages) - 1, 2):
        before = tuple(messages[: turn + 1])
        shown = sum(message.num_images for message in before)
        key = name if turn == 0 else f"{name}/{turn // 2 + 1}"
        yield VqaQuestion(key, before, parsed.images[:shown], messages[turn + 1].text.strip())
        if first_only:
            return


class VqaSettings(TaskSettings):
    """Where the data is."""

    data: Place | None = None
    """LLaVA JSON or JSON Lines."""
    images: Place | None = None
    """Folder of the images; default: the data's own folder."""
    first_only: bool = False
    """Asks only the first question of each conversation."""
    max_new_tokens: int = 32


class Vqa:
    """The task."""

    name: ClassVar[str] = "vqa"

    def __init__(self, settings: VqaSettings) -> None:
        self.settings = settings

    def questions(self) -> tuple[list[VqaQuestion], dict[str, int]]:
        """See `read_questions`."""
        if self.settings.data is None:
            raise DataError("the data of the task vqa is not named", "set vqa.data=FILE (LLaVA JSON)")
        return read_questions(self.settings.data, self.settings.first_only)

    def read(self) -> list[Item]:
        """See `Task.read`."""
        folder = self.settings.images or parent(str(self.settings.data))
        return [
            Item(
                question.question_id,
                question.question_id,
                question.messages,
                tuple(Picture(name, join(folder, name)) for name in question.images),
            )
            for question in self.questions()[0]
        ]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """See `Task.score`."""
        questions, left_out = self.questions()
        asked = {item.item_id for item in items}
        return score_answers([q for q in questions if q.question_id in asked], answers, left_out)


def score_answers(
    questions: Sequence[VqaQuestion], answers: Mapping[str, str], left_out: Mapping[str, int] | None = None
) -> Result:
    """Exact match in percent, overall and by kind of answer; unanswered questions are left out, counted."""
    rows = [_scored(q, answers[q.question_id]) for q in questions if q.question_id in answers]
    kinds = sorted({row.group for row in rows})
    figures: dict[str, Any] = {
        "task": "vqa",
        "questions": len(questions),
        "missing": len(questions) - len(rows),
        **_figures(rows),
        "by_kind": {kind: _figures([row for row in rows if row.group == kind]) for kind in kinds},
        "rows_left_out": dict(left_out or {}),
    }
    return Result(figures, rows)


def _figures(rows: Sequence[Scored]) -> dict[str, Any]:
    right = int(sum(row.parts["accuracy"][0][0] for row in rows))
    verbatim = sum(row.answer.strip() == row.reference for row in rows)
    return {
        "correct": right,
        "count": len(rows),
        "accuracy": percent(right, len(rows)),
        "verbatim": percent(verbatim, len(rows)),
    }


def _scored(question: VqaQuestion, answer: str) -> Scored:
    right = is_right(answer, [question.reference])
    return Scored(
        question_id=question.question_id,
        question=question.messages[-1].text.strip(),
        answer=answer,
        reference=question.reference,
        parts={"accuracy": [(float(right), 1.0)]},
        group=answer_kind(question.reference),
        picture=question.images[0] if question.images else None,
    )


def answer_kind(reference: str) -> str:
    """yes_no, number, or other: the kinds of VQA."""
    word = normalise(reference)
    if word in ("yes", "no"):
        return "yes_no"
    return "number" if word.removeprefix(MINUS).replace(" ", "").isdecimal() else "other"
