"""LLaVA-Bench, COCO and in the wild: open questions, graded by a judge against references (section 5.1).

Data, in the original's files: questions {question_id, image, text, category}, reference answers
{question_id, text}, contexts {image, captions, instances} or {image, caption}, and the images. The judge sees
the context, never the image. The relative score is its points for the candidate over those for the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rayva.data.locations import is_there, join, parent
from rayva.errors import DataError
from rayva.evaluation.predictions import read_predictions
from rayva.evaluation.reading import as_id, as_object, as_text, read_rows
from rayva.evaluation.rules import Context, Rule, read_contexts, read_rules, review_prompt, rule_for
from rayva.evaluation.tasks.base import Item, Picture, Place, Result, Scored, TaskSettings, ask

# Names of the released files: in the wild first, then COCO's.
_QUESTIONS = ("questions.jsonl", "qa90_questions.jsonl")
_REFERENCES = ("answers_gpt4.jsonl", "qa90_gpt4_answer.jsonl")
_CONTEXTS = ("context.jsonl", "caps_boxes_coco2014_val_80.jsonl")
_COCO = "COCO_val2014_"


@dataclass(frozen=True, slots=True)
class BenchQuestion:
    """One open question with all that the judge needs beside the candidate's answer."""

    question_id: str
    image: str
    text: str
    category: str
    reference: str
    context: Context


@dataclass(frozen=True, slots=True)
class ReviewRequest:
    """One prompt for the judge; `swapped`: the candidate's answer is shown first."""

    question_id: str
    category: str
    prompt: str
    swapped: bool


class LlavaBenchSettings(TaskSettings):
    """Where the data is; files that are not named are looked for in the folder under their released names."""

    folder: Place | None = None
    questions: Place | None = None
    references: Place | None = None
    contexts: Place | None = None
    images: Place | None = None
    """Folder of the images; COCO's may carry the prefix COCO_val2014_ or not."""
    rules: Place | None = None
    """Rules for the judge in the original's format (rule.json); default: built-in ones."""
    max_new_tokens: int = 1024


class LlavaBench:
    """The task."""

    name: ClassVar[str] = "llava_bench"

    def __init__(self, settings: LlavaBenchSettings) -> None:
        self.settings = settings

    def _file(self, setting: str, names: Sequence[str]) -> str:
        given: str | None = getattr(self.settings, setting)
        if given is not None:
            return given
        folder = self.settings.folder
        if folder is None:
            raise DataError(
                f"LLaVA-Bench's {setting} are not named", f"set llava_bench.folder or llava_bench.{setting}"
            )
        for name in names:
            path = join(folder, name)
            if is_there(path, "llava_bench.folder"):
                return path
        raise DataError(f"{folder} holds none of {', '.join(names)}", f"set llava_bench.{setting}=FILE")

    def questions(self) -> list[BenchQuestion]:
        """All questions with references and contexts.

        Raises:
            DataError: a file is missing or cut, or a question lacks its reference or context.
        """
        references = read_predictions(self._file("references", _REFERENCES), "references").outputs
        contexts = read_contexts(self._file("contexts", _CONTEXTS))
        path = self._file("questions", _QUESTIONS)
        rows = enumerate(read_rows(path, "llava_bench.questions"), 1)
        return [self._question(value, f"{path}: row {n}", references, contexts) for n, value in rows]

    def _question(
        self, value: object, where: str, references: Mapping[str, str], contexts: Mapping[str, Context]
    ) -> BenchQuestion:
        row = as_object(value, where)
        question_id = as_id(row.get("question_id"), f"{where}: question_id")
        image = as_text(row.get("image"), f"{where}: image")
        if question_id not in references:
            raise DataError(f"{where}: question {question_id} has no reference answer", "check the files")
        if image not in contexts:
            raise DataError(f"{where}: the image {image} has no context", "check the files")
        return BenchQuestion(
            question_id=question_id,
            image=image,
            text=as_text(row.get("text"), f"{where}: text"),
            category=as_text(row.get("category", "default"), f"{where}: category"),
            reference=references[question_id],
            context=contexts[image],
        )

    def read(self) -> list[Item]:
        """See `Task.read`."""
        questions = self.questions()
        folder = self.settings.images or join(self.settings.folder or parent(str(self.settings.questions)),
                                              "images")  # fmt: skip
        return [
            Item(
                question.question_id,
                question.question_id,
                (ask(question.text, 1),),
                (Picture(question.image, find_image(folder, question.image)),),
            )
            for question in questions
        ]

    def requests(self, answers: Mapping[str, str], swap: str = "reference_first") -> list[ReviewRequest]:
        """What the judge is asked about the answers (text by question id).

        Args:
            swap: "reference_first" (the original's), "candidate_first", or "both" orders.
        """
        rules = read_rules(self.settings.rules)
        orders = {"reference_first": [False], "candidate_first": [True], "both": [False, True]}[swap]
        return [
            _request(question, rules, answers[question.question_id], swapped)
            for question in self.questions()
            if question.question_id in answers
            for swapped in orders
        ]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> Result:
        """The answers alone have no score: `rayva.evaluation.judge` makes one with a judge's reviews."""
        asked = {item.item_id for item in items}
        rows = [row for row in self.rows(answers) if row.question_id in asked]
        figures: dict[str, Any] = {
            "task": "llava_bench",
            "questions": len(items),
            "missing": len(items) - len(rows),
            "relative_score": None,
            "note": "no judge was given; the same command with --judge-url and --judge-model grades",
        }
        return Result(figures, rows)

    def rows(self, answers: Mapping[str, str]) -> Iterator[Scored]:
        """The answered questions, without points."""
        for question in self.questions():
            if question.question_id in answers:
                yield Scored(
                    question_id=question.question_id,
                    question=question.text,
                    answer=answers[question.question_id],
                    reference=question.reference,
                    parts={},
                    group=question.category,
                    picture=question.image,
                )


def _request(question: BenchQuestion, rules: Mapping[str, Rule], answer: str, swapped: bool) -> ReviewRequest:
    key, rule = rule_for(rules, question.category, question.context)
    pair = (answer, question.reference) if swapped else (question.reference, answer)
    prompt = review_prompt(question.context, question.text, pair, rule)
    return ReviewRequest(question.question_id, key, prompt, swapped)


def find_image(folder: str, name: str) -> str:
    """The image's path; COCO's released names carry a prefix that the questions leave out."""
    plain = join(folder, name)
    prefixed = join(folder, _COCO + name)
    setting = "llava_bench.images"
    return prefixed if not is_there(plain, setting) and is_there(prefixed, setting) else plain
