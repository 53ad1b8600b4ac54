"""Files of predictions, in the forms that LLaVA's and ScienceQA's scripts write them.

{acc, correct, count, results: {id: index}, outputs: {id: text}}   eval_science_qa.py, run_gpt3.py
{correct: [{question_id, pred}], incorrect: [...]}                 eval_science_qa.py --output-file
{"question_id": ..., "text": ...} a line                           model_vqa.py, model_vqa_science.py
{id: text}
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from rayva.errors import DataError
from rayva.evaluation.reading import as_id, as_integer, as_object, as_text, read_rows, unique

_FORMS = (
    "give {results, outputs}, JSON Lines of {question_id, text}, or {id: text} "
    "(docs/evaluate.md lists the forms)"
)
NO_CHOICE = -1
"""The index that the original writes for an answer that names no choice."""
_WHOLE_NUMBER = re.compile(r"\s*-?[0-9]{1,9}\s*")
_ID_KEYS = ("question_id", "id", "questionId")
_TEXT_KEYS = ("text", "answer", "pred", "output")


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model answered.

    Attributes:
        outputs: answer by question id; empty where the file has only indices. A file may lack some.
        indices: stored choice by question id; None where the file has none. Outside the choices: no answer.
            A file may lack some.
        reported: figures that the file itself states (`acc`, `correct`, `count`).
    """

    path: str
    outputs: dict[str, str]
    indices: dict[str, int] | None = None
    reported: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Ids of all answered questions."""
        return list({**self.outputs, **(self.indices or {})})

    def only(self, ids: Container[str]) -> Predictions:
        """The predictions of some questions."""
        outputs = {key: text for key, text in self.outputs.items() if key in ids}
        indices = self.indices and {key: index for key, index in self.indices.items() if key in ids}
        return Predictions(self.path, outputs, indices)


def read_predictions(path: str, what: str = "--predictions") -> Predictions:
    """Reads a file of predictions in any of the forms above.

    Raises:
        DataError: it is missing, empty, cut, of no known form, or answers a question twice.
    """
    rows = read_rows(path, what)
    if len(rows) == 1 and isinstance(rows[0], dict) and _row_id(rows[0]) is None:
        return _document(path, rows[0])
    pairs = (_row(row, f"{path}: row {number}") for number, row in enumerate(rows, 1))
    return Predictions(path, unique(pairs, path))


def _document(path: str, whole: dict[str, Any]) -> Predictions:
    if isinstance(whole.get("correct"), list) or isinstance(whole.get("incorrect"), list):
        return Predictions(path, unique(_analysed(path, whole), path))
    if "outputs" in whole or "results" in whole:
        return _results(path, whole)
    if not whole:
        raise DataError(f"{path} holds no predictions", _FORMS)
    values = {key: _plain(value, f"{path}: {key!r}") for key, value in whole.items()}
    return Predictions(path, values)


def _results(path: str, whole: dict[str, Any]) -> Predictions:
    """A null is no answer: an empty text, or an index that is no choice."""
    outputs, results = (_entries(path, whole, name) for name in ("outputs", "results"))
    if not outputs and not results:
        raise DataError(f"{path} holds no predictions: its outputs and results are empty", _FORMS)
    texts = {
        key: as_text("" if value is None else value, f"{path}: outputs[{key!r}]")
        for key, value in outputs.items()
    }
    indices = {key: _index(value, f"{path}: results[{key!r}]") for key, value in results.items()}
    if texts and indices and not (indices.keys() <= texts.keys() or texts.keys() <= indices.keys()):
        odd = sorted(indices.keys() - texts.keys()), sorted(texts.keys() - indices.keys())
        raise DataError(
            f"{path}: results and outputs are of different questions ({odd[0][0]!r} is in results only, "
            f"{odd[1][0]!r} in outputs only)",
            "the file may be put together from two; write it again",
        )
    figures = {
        name: float(whole[name])
        for name in ("acc", "correct", "count")
        if isinstance(whole.get(name), (int, float)) and abs(whole[name]) < 1e12
    }
    return Predictions(path, texts, indices or None, figures)


def _entries(path: str, whole: dict[str, Any], name: str) -> dict[str, Any]:
    given = whole.get(name)
    return {} if given is None else as_object(given, f"{path}: {name}")


def _index(value: object, where: str) -> int:
    """An index, also as text or as a number with nothing behind the point; null is `NO_CHOICE`."""
    if value is None:
        return NO_CHOICE
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return as_integer(value, where)


def _analysed(path: str, whole: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name in ("correct", "incorrect"):
        rows = whole.get(name, [])
        if not isinstance(rows, list):
            raise DataError(f"{path}: {name} is no list", _FORMS)
        for number, row in enumerate(rows, 1):
            yield _row(row, f"{path}: {name} {number}")


def _row(value: object, where: str) -> tuple[str, str]:
    row = as_object(value, where)
    key = _row_id(row)
    if key is None:
        raise DataError(f"{where} has no question_id", _FORMS)
    return as_id(row[key], f"{where}: {key}"), row_text(row, where)


def _row_id(row: dict[str, Any]) -> str | None:
    return next((key for key in _ID_KEYS if key in row), None)


def row_text(row: dict[str, Any], where: str) -> str:
    """The answer of a row, under whichever name the file has it."""
    for key in _TEXT_KEYS:
        if key in row:
            return as_text(row[key], f"{where}: {key}")
    raise DataError(f"{where} has no text", _FORMS)


def _plain(value: object, where: str) -> str:
    return row_text(value, where) if isinstance(value, dict) else as_text(value, where)


def require_overlap(predictions: Predictions, known: Iterable[str], what: str) -> None:
    """Refuses predictions of other questions altogether.

    Raises:
        DataError: a predicted question is none of the `known` ones.
    """
    strange = sorted(set(predictions.ids) - set(known))
    if strange:
        raise DataError(
            f"{predictions.path} answers {len(strange)} questions that {what} does not have, "
            f"{strange[0]!r} among them",
            "give the predictions and the questions of the same data set",
        )
