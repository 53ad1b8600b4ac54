"""POPE: does the model see objects that are not there? Yes-or-no questions in three settings.

Data: the official label files, `coco_pope_{random,popular,adversarial}.json`, one {question_id, image, text,
label} a line, and the images of COCO val2014. Answers are read as the original does: of the first sentence,
"no" where the words No, no or not occur in it, else "yes". Yes is the positive class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rayva.data.locations import is_folder, join, list_folder
from rayva.errors import DataError
from rayva.evaluation.predictions import row_text
from rayva.evaluation.reading import as_id, as_object, as_text, read_rows, shown, unique
from rayva.evaluation.tasks.base import Item, Picture, Place, Result, Scored, TaskSettings, ask, percent

_LABEL_FILE = re.compile(r"(?:coco_)?pope_(?P<category>\w+)\.jsonl?")
_NEGATIVE = {"No", "not", "no"}
_INSTRUCTION = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, slots=True)
class PopeQuestion:
    """One question; ids are unique within a category only."""

    question_id: str
    category: str
    image: str
    text: str
    present: bool

    @property
    def key(self) -> str:
        return f"{self.category}/{self.question_id}"


def says_yes(answer: str) -> bool:
    """The answer as the original reads it."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not _NEGATIVE.intersection(words)


def is_plain(answer: str) -> bool:
    """Whether the answer says yes or no at all; the original counts everything else as a yes."""
    words = {word.strip(".,!;:\"'\n").lower() for word in answer.split()}
    return bool(words & {"yes", "no", "not"})


def read_labels(path: str) -> list[PopeQuestion]:
    """One label file; its category is in its name, or the name itself.

    Raises:
        DataError: it is missing, cut, or a row is no question with a label.
    """
    name = path.rpartition("/")[2]
    found = _LABEL_FILE.fullmatch(name)
    category = found["category"] if found else name.partition(".")[0]
    questions = []
    seen: set[str] = set()
    for number, value in enumerate(read_rows(path, "--labels"), 1):
        where = f"{path}: row {number}"
        row = as_object(value, where)
        label = as_text(row.get("label"), f"{where}: label").strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"{where}: the label is {shown(label)}, not yes or no", "check the file")
        question_id = as_id(row.get("question_id", number), f"{where}: question_id")
        if question_id in seen:
            raise DataError(f"{where}: question {question_id!r} occurs again", "do not mix label files")
        seen.add(question_id)
        image = as_text(row.get("image", ""), f"{where}: image")
        text = as_text(row.get("text", row.get("question")), f"{where}: text")
        questions.append(PopeQuestion(question_id, category, image, text, label == "yes"))
    return questions


def label_files(folder: str) -> list[str]:
    """The label files in a folder.

    Raises:
        DataError: there are none.
    """
    names = [n for n in list_folder(folder, "pope.folder") if _LABEL_FILE.fullmatch(n.rpartition("/")[2])]
    if not names:
        raise DataError(f"{folder} holds no coco_pope_*.json", "give the folder with POPE's label files")
    return [join(folder, name) for name in names]


class PopeSettings(TaskSettings):
    """Where the data is."""

    folder: Place | None = None
    """Holds the label files."""
    images: Place | None = None
    """Folder of COCO's val2014 images; default: `val2014` in the folder, or the folder itself."""
    short_answers: bool = True
    """Ends each question with the instruction to answer in a word (as LLaVA 1.5 does)."""
    max_new_tokens: int = 16


class Pope:
    """The task."""

    name: ClassVar[str] = "pope"

    def __init__(self, settings: PopeSettings) -> None:
        self.settings = settings

    def questions(self) -> list[PopeQuestion]:
        """All questions of all label files."""
        if self.settings.folder is None:
            raise DataError("POPE's data is not named", "set pope.folder=FOLDER (and pope.images=FOLDER)")
        return [question for path in label_files(self.settings.folder) for question in read_labels(path)]

    def read(self) -> list[Item]:
        """See `Task.read`."""
        folder = str(self.settings.folder)
        questions = self.questions()
        usual = join(folder, "val2014")
        images = self.settings.images or (usual if is_folder(usual, "pope.folder") else folder)
        return [
            Item(
                question.key,
                question.key,
                (ask(self._text(question), 1),),
                (Picture(question.image, join(images, question.image)),),
            )
            for question in questions
        ]

    def _text(self, question: PopeQuestion) -> str:
        wanted = self.settings.short_answers and _INSTRUCTION.strip() not in question.text
        return question.text + (_INSTRUCTION if wanted else "")

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """See `Task.score`."""
        asked = {item.item_id for item in items}
        return score_answers([q for q in self.questions() if q.key in asked], answers)


def match_answers(
    labels: Mapping[str, Sequence[PopeQuestion]], rows: Sequence[Any], path: str
) -> dict[str, str]:
    """Answers by question key, from one file of answers to one or more label files.

    Rows are told apart by their `category`, or belong to the only label file. Within a category they are
    matched by `question_id` where those are the label file's, and else, as the original does, by order.

    Raises:
        DataError: rows and labels do not belong together.
    """
    keys = {question.key for questions in labels.values() for question in questions}
    if all(isinstance(row, dict) and str(row.get("question_id")) in keys for row in rows):  # our own answers
        named = ((str(row["question_id"]), row_text(row, path)) for row in rows)
        return unique(named, path)
    by_category: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    only = next(iter(labels)) if len(labels) == 1 else None
    for number, value in enumerate(rows, 1):
        where = f"{path}: row {number}"
        row = as_object(value, where)
        category = row.get("category", only)
        if not isinstance(category, str) or category not in labels:
            raise DataError(
                f"{where}: the category is {shown(category)}; the label files are of {', '.join(labels)}",
                "give --questions with the categories, or one label file with its own answers",
            )
        key = as_id(row["question_id"], f"{where}: question_id") if "question_id" in row else None
        by_category[category].append((key, row_text(row, where)))
    answers: dict[str, str] = {}
    for category, questions in labels.items():
        answers.update(_matched(questions, by_category[category], path))
    return answers


def _matched(
    questions: Sequence[PopeQuestion], given: Sequence[tuple[str | None, str]], path: str
) -> dict[str, str]:
    by_id = {question.question_id: question for question in questions}
    ids = [key for key, _ in given if key is not None]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path} answers a question more than once", "give one answer a question")
    if given and len(ids) == len(given) and all(key in by_id for key in ids):
        return {by_id[str(key)].key: text for key, text in given}
    if len(given) != len(questions):
        raise DataError(
            f"{path} has {len(given)} answers to the {len(questions)} questions of {questions[0].category!r}",
            "the file may be cut, or be of another data set",
        )
    return {question.key: text for question, (_, text) in zip(questions, given, strict=True)}


def score_answers(questions: Sequence[PopeQuestion], answers: Mapping[str, str]) -> Result:
    """Accuracy, precision, recall, F1 and share of yes: by category, and their mean (LLaVA 1.5's figure).

    Questions without an answer are left out and counted.
    """
    rows = [_scored(question, answers[question.key]) for question in questions if question.key in answers]
    categories = list(dict.fromkeys(question.category for question in questions))
    by_category = {name: _figures([row for row in rows if row.group == name]) for name in categories}
    f1 = [cell["f1"] for cell in by_category.values()]
    figures = {
        "task": "pope",
        "questions": len(questions),
        "missing": len(questions) - len(rows),
        "neither_yes_nor_no": sum(bool(row.note) for row in rows),
        **_figures(rows),
        "mean_f1": round(sum(f1) / len(f1), 4) if f1 and None not in f1 else None,
        "by_category": by_category,
    }
    return Result(figures, rows)


def _scored(question: PopeQuestion, answer: str) -> Scored:
    yes = says_yes(answer)
    hit = float(yes and question.present)
    said, present = float(yes), float(question.present)
    return Scored(
        question_id=question.key,
        question=question.text,
        answer=answer,
        reference="yes" if question.present else "no",
        parts={
            "accuracy": [(float(yes == question.present), 1.0)],
            "precision": [(hit, said)],
            "recall": [(hit, present)],
            "f1": [(2 * hit, said + present)],
            "share_of_yes": [(said, 1.0)],
        },
        group=question.category,
        picture=question.image,
        note="" if is_plain(answer) else "says neither yes nor no",
    )


def _figures(rows: Sequence[Scored]) -> dict[str, Any]:
    """Percentages, and the counts behind them."""
    sums: dict[str, tuple[float, float]] = {}
    for name in ("accuracy", "precision", "recall", "f1", "share_of_yes"):
        pairs = [row.parts[name][0] for row in rows]
        sums[name] = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    hits = int(sums["precision"][0])
    said, present = int(sums["precision"][1]), int(sums["recall"][1])
    right, count = int(sums["accuracy"][0]), len(rows)
    counts = {"tp": hits, "fp": said - hits, "fn": present - hits, "tn": right - hits}
    return {name: percent(*pair) for name, pair in sums.items()} | {"count": count, **counts}
