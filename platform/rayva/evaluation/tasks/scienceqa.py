"""ScienceQA: multiple choice questions from school, with text, with an image, or with neither (section 5.2).

Data: `problems.json`, `pid_splits.json` and `images/SPLIT/ID/image.png`, as lupantech/ScienceQA has them.
Answers are read by rule alone; an answer that names no choice is counted as such and is wrong. The original
draws one at random for it, and so a figure of 90.92 % was published of outputs that are 90.90 % right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

from rayva.data.locations import is_folder, is_there, join, parent
from rayva.errors import DataError
from rayva.evaluation.predictions import NO_CHOICE, Predictions, require_overlap
from rayva.evaluation.reading import (
    as_id,
    as_integer,
    as_object,
    as_text,
    read_document,
    shown,
)
from rayva.evaluation.tasks.base import Item, Picture, Place, Result, Scored, TaskSettings, ask, percent

_STATED = re.compile(r"The answer is ([A-Z]).")
_LEPA = re.compile(r"ANSWER: ([A-Z])\.")
_SHOWN_DIFFERENCES = 20
_SHOWN_SPLITS = 10
_LOWER_GRADES = {f"grade{number}" for number in range(1, 7)}
_HIGHER_GRADES = {f"grade{number}" for number in range(7, 13)}
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LETTERS = frozenset("ABCDE")

Format = Literal["QCM-LEPA", "QCM-LEA", "QCM-A", "CQM-A"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One question; `answer` is the index of the right choice. Fields that a file lacks are None."""

    problem_id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    subject: str | None
    grade: str | None

    def letter(self, index: int | None) -> str:
        """The letter of a choice; "" for none."""
        return "" if index is None else ascii_uppercase[index]


def read_problems(problems: str, splits: str | None, split: str, setting: str = "--") -> list[Problem]:
    """The problems of a split, in the split's order.

    Without a file of splits, those whose own field `split` names it; all of them where they have none.

    Args:
        setting: what stands before the names of the settings, for messages.

    Raises:
        DataError: a file is missing, cut or of another form, or a problem is not whole.
    """
    whole = as_object(read_document(problems, f"{setting}problems"), problems)
    ids = _own_split(whole, split)
    if splits is not None:
        table = as_object(read_document(splits, f"{setting}splits"), splits)
        if not isinstance(table.get(split), list):
            named = sorted(name for name, value in table.items() if isinstance(value, list))
            raise DataError(
                f"{splits} has no split {split!r}; it has {', '.join(named[:_SHOWN_SPLITS]) or 'none'}",
                f"name one of them as {setting}split"
                if named
                else f"give pid_splits.json as {setting}splits",
            )
        ids = [as_id(key, f"{splits}: {split}") for key in table[split]]
    lacking = [key for key in ids if key not in whole]
    if lacking:
        raise DataError(
            f"{problems} lacks {len(lacking)} of the {len(ids)} problems of {split!r}, {lacking[0]!r} first",
            "the file may be cut, or belong to other splits",
        )
    if len(set(ids)) < len(ids) or not ids:
        raise DataError(
            f"{splits or problems}: {split!r} is empty or names a problem twice",
            f"check it, and {setting}split",
        )
    return [_problem(key, whole[key], f"{problems}: problem {key}") for key in ids]


def _own_split(whole: dict[str, Any], split: str) -> list[str]:
    """Ids of the problems that say that they are of a split; of all of them where not each says of which."""
    said = {key: row.get("split") if isinstance(row, dict) else None for key, row in whole.items()}
    unknown = None in said.values()
    return [key for key, own in said.items() if unknown or own == split]


def _problem(key: str, value: object, where: str) -> Problem:
    row = as_object(value, where)
    choices = row.get("choices")
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(ascii_uppercase):
        raise DataError(f"{where}: choices is {shown(choices)}", "check that the file is whole")
    answer = as_integer(row.get("answer"), f"{where}: answer")
    if not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer {answer} is none of its {len(choices)} choices", "check the file")
    texts = {name: _optional(row, name, where) for name in ("hint", "image", "subject", "grade")}
    return Problem(
        problem_id=key,
        question=as_text(row.get("question"), f"{where}: question"),
        choices=tuple(as_text(choice, f"{where}: choices") for choice in choices),
        answer=answer,
        hint=texts["hint"] or "",
        image=texts["image"] or None,
        subject=texts["subject"],
        grade=texts["grade"],
    )


def _optional(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    return None if value is None else as_text(value, f"{where}: {name}")


def parse_choice(text: str, choices: int) -> int | None:
    """The choice that an answer names, by the original's rule; None where it names none, or several.

    A bare letter, "X. ...", or "The answer is X." exactly once; the answer of the format QCM-LEPA
    ("ANSWER: X.") where that does not occur. A letter beyond the choices is none.
    """
    text = text.strip()
    if text in _LETTERS or (text[:1] in _LETTERS and text[1:3] == ". "):
        letter = text[0]
    else:
        found = _STATED.findall(text) or _LEPA.findall(text)
        if len(found) != 1:
            return None
        letter = found[0]
    index = ascii_uppercase.find(letter)
    return index if 0 <= index < choices else None


def question_text(problem: Problem, form: Format) -> str:
    """The question as the original's conversion writes it: "N/A" for no context, options (A) (B) ..."""
    context = problem.hint.strip() or "N/A"
    options = " ".join(f"({ascii_uppercase[n]}) {choice}" for n, choice in enumerate(problem.choices))
    if form.startswith("CQM"):
        text = f"Context: {context}\nQuestion: {problem.question}\nOptions: {options}"
    else:
        text = f"{problem.question}\nContext: {context}\nOptions: {options}"
    if form.endswith("-A"):
        text += "\nAnswer with the option's letter from the given choices directly."
    return text.replace("  ", " ").strip()


class ScienceQASettings(TaskSettings):
    """Where the data is and how it is asked."""

    folder: Place | None = None
    """Holds problems.json, images/, and pid_splits.json unless the problems' own field `split` is meant."""
    problems: Place | None = None
    splits: Place | None = None
    images: Place | None = None
    """Holds SPLIT/ID/IMAGE or ID/IMAGE; default: `images` in the folder."""
    split: str = "test"
    format: Format = "QCM-LEA"
    """QCM-LEPA: the paper's, trained to answer after lecture and solution; QCM-LEA: LLaVA 1.0's;
    QCM-A and CQM-A ask for the letter alone (LLaVA 1.5)."""
    image_position: Literal["front", "end"] = "front"
    """`end` is the data's own order (input, then image); LLaVA 1.0 and later move it to the front."""
    max_new_tokens: int = 1024
    second: Place | None = None
    """Predictions of a second model, for an ensemble with it."""
    ensemble: Literal["complement", "judge"] = "complement"


class ScienceQA:
    """The task."""

    name: ClassVar[str] = "scienceqa"

    def __init__(self, settings: ScienceQASettings) -> None:
        self.settings = settings

    def problems(self) -> list[Problem]:
        """See `read_problems`."""
        given = self.settings
        if given.problems is None and given.folder is None:
            raise DataError("ScienceQA's data is not named", "set scienceqa.folder=FOLDER")
        folder = given.folder or parent(str(given.problems))
        problems = given.problems or join(folder, "problems.json")
        splits = given.splits
        usual = join(folder, "pid_splits.json")
        if splits is None and is_there(usual, f"{self.name}.folder"):
            splits = usual
        return read_problems(problems, splits, given.split, f"{self.name}.")

    def read(self) -> list[Item]:
        """See `Task.read`."""
        problems = self.problems()
        given = self.settings
        images = given.images or join(given.folder or parent(str(given.problems)), "images")
        of_split = join(images, given.split)
        if is_folder(of_split, f"{self.name}.images"):
            images = of_split
        return [self._item(problem, images) for problem in problems]

    def _item(self, problem: Problem, images: str) -> Item:
        given = self.settings
        pictures = []
        if problem.image:
            name = f"{problem.problem_id}/{problem.image}"
            pictures = [Picture(name, join(images, name))]
        message = ask(question_text(problem, given.format), len(pictures), given.image_position)
        # A model trained on QCM-LEPA with the separator ### stops before "ANSWER:", and is asked to go on.
        then = "\n###\nANSWER:" if given.format == "QCM-LEPA" else ""
        return Item(problem.problem_id, problem.problem_id, (message,), tuple(pictures), then=then)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """See `Task.score`."""
        asked = {item.item_id for item in items}
        problems = [problem for problem in self.problems() if problem.problem_id in asked]
        given = Predictions("the answers", dict(answers))
        return score_predictions(problems, given, self.settings.split)


def score_predictions(
    problems: Sequence[Problem], predictions: Predictions, split: str, known: Iterable[str] | None = None
) -> Result:
    """Both figures side by side: from the outputs by rule, and from stored indices where there are any.

    Args:
        known: ids of all problems of the file, of any split.

    Raises:
        DataError: the predictions are of other questions.
    """
    ids = {problem.problem_id for problem in problems}
    require_overlap(predictions, ids if known is None else known, "the file of problems")
    outside = [key for key in predictions.ids if key not in ids]
    missing = ids.difference(predictions.ids)
    if len(missing) == len(ids):
        raise DataError(f"{predictions.path} answers no problem of the split {split!r}", "check the split")
    parsed = parse_outputs(problems, predictions)
    stored = stored_choices(problems, predictions)
    figures: dict[str, Any] = {
        "task": "scienceqa",
        "split": split,
        "questions": len(problems),
        "answered": len(ids) - len(missing),
        "missing": len(missing),
        "not_in_split": len(outside),
        "from_outputs": None if parsed is None else figures_of(problems, parsed),
        "from_indices": None if stored is None else figures_of(problems, stored),
    }
    if parsed is not None and stored is not None:
        answered = ids - missing
        figures["without_output"] = sum(not predictions.outputs.get(key) for key in answered)
        figures["without_index"] = sum(key not in (predictions.indices or {}) for key in answered)
        figures["differ"] = list(_differences(problems, parsed, stored))[:_SHOWN_DIFFERENCES]
    if predictions.reported:
        figures["reported_by_file"] = predictions.reported
    figures["not_available"] = lacking_fields(problems)
    chosen = parsed if parsed is not None else stored or {}
    rows = [_row(problem, predictions, chosen.get(problem.problem_id)) for problem in problems]
    return Result(figures, rows)


Choices = dict[str, int | None]
"""The chosen index by problem; None where an answer names no choice, or there is none."""


def parse_outputs(problems: Sequence[Problem], predictions: Predictions) -> Choices | None:
    """Choices by rule; None where the file has no outputs."""
    if not predictions.outputs:
        return None
    return {
        p.problem_id: parse_choice(predictions.outputs.get(p.problem_id, ""), len(p.choices))
        for p in problems
    }


def stored_choices(problems: Sequence[Problem], predictions: Predictions) -> Choices | None:
    """Stored indices; one that is none of the choices (the original writes -1) is None."""
    if predictions.indices is None:
        return None
    stored = ((p, predictions.indices.get(p.problem_id, NO_CHOICE)) for p in problems)
    return {p.problem_id: index if 0 <= index < len(p.choices) else None for p, index in stored}


def figures_of(problems: Sequence[Problem], choices: Choices) -> dict[str, Any]:
    """Accuracy in percent: overall, and by subject, context and grade as far as the problems tell them."""
    cells: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    right = 0
    for problem in problems:
        hit = choices.get(problem.problem_id) == problem.answer
        right += hit
        for table, cell in _cells(problem):
            cells[table][cell][0] += hit
            cells[table][cell][1] += 1
    figures: dict[str, Any] = {
        "correct": right,
        "count": len(problems),
        "accuracy": percent(right, len(problems)),
        "unparsable": sum(choices.get(p.problem_id) is None for p in problems),
    }
    for table, rows in cells.items():
        figures[table] = {
            cell: {"correct": count[0], "count": count[1], "accuracy": percent(*count)}
            for cell, count in sorted(rows.items())
        }
    return figures


def _cells(problem: Problem) -> Iterator[tuple[str, str]]:
    """Table and cell of each breakdown; a problem may have text and image at once (table 7)."""
    if problem.hint:
        yield "by_context", "TXT"
    if problem.image:
        yield "by_context", "IMG"
    if not problem.hint and not problem.image:
        yield "by_context", "NO"
    if problem.subject is not None:
        yield "by_subject", _SUBJECTS.get(problem.subject, problem.subject)
    if problem.grade in _LOWER_GRADES:
        yield "by_grade", "G1-6"
    elif problem.grade in _HIGHER_GRADES:
        yield "by_grade", "G7-12"


def lacking_fields(problems: Sequence[Problem]) -> dict[str, str]:
    """Breakdowns that cannot be made, and why."""
    lacking = {}
    for table, name in (("by_subject", "subject"), ("by_grade", "grade")):
        without = sum(getattr(problem, name) is None for problem in problems)
        if without:
            lacking[table] = f"{without} of {len(problems)} problems have no field {name!r}"
    return lacking


def _differences(problems: Sequence[Problem], parsed: Choices, stored: Choices) -> Iterator[dict[str, Any]]:
    for problem in problems:
        ours, theirs = parsed[problem.problem_id], stored[problem.problem_id]
        if ours != theirs:
            yield {
                "question_id": problem.problem_id,
                "from_outputs": problem.letter(ours) or None,
                "from_indices": problem.letter(theirs) or None,
                "answer": problem.letter(problem.answer),
            }


def _row(problem: Problem, predictions: Predictions, choice: int | None) -> Scored:
    text = predictions.outputs.get(problem.problem_id, problem.letter(choice))
    return Scored(
        question_id=problem.problem_id,
        question=question_text(problem, "QCM-LEA"),
        answer=text,
        reference=f"{problem.letter(problem.answer)}. {problem.choices[problem.answer]}",
        parts={"accuracy": [(float(choice == problem.answer), 1.0)]},
        group="IMG" if problem.image else "TXT" if problem.hint else "NO",
        picture=problem.image and f"{problem.problem_id}/{problem.image}",
        note="" if choice is not None else "names no choice",
    )
