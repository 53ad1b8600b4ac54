"""Grounding, the gate's task: held-out questions with the right image, another one, and none.

Data: the storage root of a finished run (its held-out questions and images), or LLaVA JSON, of which the
first question of each row with one image and an answer that can be graded is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyarrow.parquet as pq

from rayva.data.answer_match import how_to_grade
from rayva.data.locations import ImageFolder, join, parent
from rayva.data.quarantine import BadRow
from rayva.data.schema import Question
from rayva.data.tables import read_records
from rayva.errors import DataError
from rayva.evaluation.gate import decide
from rayva.evaluation.grounding import GATE_TASK, Ask, plan_asks
from rayva.evaluation.metrics import Answer, accuracies, grounding_figures, tally
from rayva.evaluation.tasks.base import Item, Picture, Place, Result, Scored, TaskSettings
from rayva.evaluation.tasks.vqa import answer_kind, read_questions
from rayva.recipes.schema import Evaluation
from rayva.steps import SUMMARY, StepFolder, read_summary
from rayva.storage import Storage


class GroundingSettings(TaskSettings):
    """Where the questions are, and what the gate demands."""

    run: Place | None = None
    """Storage root of a run."""
    data: Place | None = None
    """LLaVA JSON instead of a run."""
    images: Place | None = None
    """Folder of the images of `data`; default: the file's own folder."""
    max_questions: int | None = None
    seed: int = 0
    min_accuracy: float = 0.5
    min_margin: float = 0.2


class Grounding:
    """The task."""

    name: ClassVar[str] = GATE_TASK

    def __init__(self, settings: GroundingSettings) -> None:
        self.settings = settings
        self._left_out: dict[str, int] = {}

    def read(self) -> list[Item]:
        """See `Task.read`."""
        given = self.settings
        if given.run is not None:
            questions, pictures = _of_run(Storage(given.run))
        elif given.data is not None:
            questions, pictures = _of_json(given.data, given.images)
        else:
            raise DataError(
                "grounding has no questions", "set grounding.run=STORAGE, or grounding.data=LLAVA_JSON"
            )
        keys = {name: _content_key(picture) for name, picture in pictures.items()}
        plan = plan_asks(questions, keys, given.max_questions, given.seed)
        self._left_out = plan.left_out
        return [_item(one, pictures) for one in plan.asks if one.question.task == GATE_TASK]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """See `Task.score`."""
        given = [Answer(_ask(item), answers[item.item_id]) for item in items if item.item_id in answers]
        figures = grounding_figures(given)
        limits = Evaluation(min_accuracy=self.settings.min_accuracy, min_margin=self.settings.min_margin)
        decision = decide(figures, limits)
        rows: dict[str, Any] = {
            "task": GATE_TASK,
            **figures,
            "missing": len(items) - len(given),
            "by_kind": accuracies(tally(given, "kind")),
            "left_out": self._left_out,
            "passed": decision.passed,
            "why": decision.why,
        }
        return Result(rows, _scored(given))


def _of_run(storage: Storage) -> tuple[list[Question], dict[str, Picture]]:
    """Held-out questions and test images of a run's data step."""
    folder = run_step(storage, "data")
    questions = list(read_records(storage, folder.join("questions.parquet"), Question))
    wanted = {question.image_id for question in questions if question.image_id}
    with storage.open(folder.join("images.parquet")) as file:
        columns = ["image_id", "uri", "content"]
        rows = pq.read_table(file, columns=columns, filters=[("image_id", "in", wanted)]).to_pylist()
    return questions, {row["image_id"]: Picture(row["image_id"], row["uri"], row["content"]) for row in rows}


def run_step(storage: Storage, name: str) -> StepFolder:
    """The folder of a finished step of the run in `storage`.

    Raises:
        DataError: there is no run, or the step is not finished.
    """
    if storage.exists(SUMMARY):
        stage = read_summary(storage)["stages"].get(name)
        if stage is not None:
            folder = StepFolder(storage, name, stage["digest"])
            if folder.manifest() is not None:
                return folder
    raise DataError(
        f"{storage.root} holds no run with a finished step {name!r}",
        "give a --storage of full.py",
    )


def _of_json(data: str, images: str | None) -> tuple[list[Question], dict[str, Picture]]:
    folder = ImageFolder(images or parent(data))
    questions, pictures = [], {}
    for found in read_questions(data, first_only=True)[0]:
        text = found.messages[-1].text.strip()
        match = how_to_grade(text, found.reference)
        if len(found.images) != 1 or match is None:
            continue
        name = found.images[0]
        kind = answer_kind(found.reference) if match == "text" else match
        accepted = (found.reference,)
        questions.append(Question(found.question_id, name, GATE_TASK, kind, text, accepted, match))
        try:
            pictures[name] = Picture(name, folder.resolve(name))
        except BadRow:
            continue  # plan_asks counts the question as one without a usable image
    if not pictures:
        raise DataError(
            f"{data} has no question about one image in {folder.root} whose answer can be graded",
            "give LLaVA JSON with short answers (docs/data.md), and its images as grounding.images",
        )
    return questions, pictures


def _content_key(picture: Picture) -> str:
    """Tells contents apart; files are told apart by their names, without reading them all."""
    if picture.content is not None:
        return hashlib.sha256(picture.content).hexdigest()
    return join("", str(picture.uri))


def _item(one: Ask, pictures: Mapping[str, Picture]) -> Item:
    question = one.question
    return Item(
        item_id=f"{question.question_id}/{one.condition}",
        question_id=question.question_id,
        messages=tuple(one.messages()),
        pictures=() if one.image_id is None else (pictures[one.image_id],),
        facts={
            "condition": one.condition,
            "image_id": one.image_id,
            "right_image": question.image_id,
            "kind": question.kind,
            "accepted": list(question.accepted),
            "match": question.match,
        },
    )


def _ask(item: Item) -> Ask:
    facts = item.facts
    text, accepted = item.messages[-1].text, tuple(facts["accepted"])
    question = Question(
        item.question_id, facts["right_image"], GATE_TASK, facts["kind"], text.strip(), accepted,
        facts["match"],
    )  # fmt: skip
    return Ask(question, facts["condition"], facts["image_id"])


_FIGURES = {
    "right_image": "accuracy",
    "shuffled_images": "accuracy_shuffled_images",
    "no_image": "accuracy_no_image",
}


def _scored(answers: Sequence[Answer]) -> list[Scored]:
    """One row a question: right or not under each condition; the text is that of the right image."""
    by_question: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        by_question.setdefault(answer.ask.question.question_id, {})[answer.ask.condition] = answer
    rows = []
    for question_id, given in by_question.items():
        main = given.get("right_image") or next(iter(given.values()))
        question = main.ask.question
        rows.append(
            Scored(
                question_id=question_id,
                question=question.question,
                answer=main.text,
                reference=" / ".join(question.accepted[:3]),
                parts={_FIGURES[name]: [(float(answer.correct), 1.0)] for name, answer in given.items()},
                group=question.kind,
                picture=question.image_id or None,
            )
        )
    return rows
