"""An evaluation of one model on several tasks: ask, score, judge, report, track. Resumable at any point."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from rayva.errors import DataError, WeightsError
from rayva.evaluation.answers import Answered, AnswerStore, Asked, Sampled, asked
from rayva.evaluation.chat import ChatModel
from rayva.evaluation.comparison import as_json, compare
from rayva.evaluation.comparison_report import load_pictures, render
from rayva.evaluation.judge import Judge, decide, review
from rayva.evaluation.predictions import Predictions, read_predictions
from rayva.evaluation.records import EVALUATION, lines, read_run, write_result
from rayva.evaluation.reviews import Compat
from rayva.evaluation.tasks.base import Item, Picture, Result, Task, prompt_rows
from rayva.evaluation.tasks.llava_bench import LlavaBench
from rayva.evaluation.tasks.scienceqa import ScienceQA
from rayva.evaluation.tasks.scienceqa_ensemble import complement, judged, require_second
from rayva.llm.request import ChatAnswer, ChatRequest, Sampling
from rayva.lock import JobLock
from rayva.orchestration.answering import Replicas
from rayva.progress import Progress, say
from rayva.provenance import code_version
from rayva.serving.client import data_uri
from rayva.storage import Storage
from rayva.vision.decode import BadImage
from rayva.vision.source import read_image_bytes

_EDGE = 1 << 20


@dataclass(frozen=True)
class Exam:
    """What is asked of which model.

    Attributes:
        model: a model folder (path or URI), or None where `endpoint` answers.
        max_new_tokens: replaces the tasks' own limits.
        limit: asks only that many questions of each task, drawn with `seed`.
        tracking_uri: MLflow store; None is SQLite under the storage root, "none" no tracking.
    """

    tasks: Sequence[Task]
    model: str | None
    endpoint: ChatModel | None
    replicas: Replicas = field(default_factory=Replicas)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    limit: int | None = None
    judge: Judge | None = None
    compat: Compat = "none"
    tracking_uri: str | None = "none"
    experiment: str = "rayva-evaluate"

    @property
    def shown(self) -> str:
        """The model for people to read."""
        return self.endpoint.shown if self.endpoint else str(self.model)


def run_exam(exam: Exam, storage: Storage) -> dict[str, Any]:
    """Runs the evaluation and writes it to the storage; returns the figures of every task.

    Raises:
        DataError: data that is missing, or a storage that holds another model's evaluation.
        RayvaError: the model or the endpoint cannot answer; what is answered is kept.
    """
    storage.check_writable()
    with JobLock(storage, "evaluation"):
        identity = _identity(exam)
        _claim(exam, identity, storage)
        _check_second(exam.tasks)
        items = {task.name: _drawn(task.read(), exam) for task in exam.tasks}
        questions = [
            asked(task.name, item, _sampled(task, exam), identity)
            for task in exam.tasks
            for item in items[task.name]
        ]
        _require_distinct(questions)
        answers = _answer(exam, questions, storage)
        figures = {task.name: _score(task, items[task.name], answers, exam, storage) for task in exam.tasks}
        storage.write_json("metrics.json", figures)
        _report(exam, figures, storage)
    return figures


def _identity(exam: Exam) -> dict[str, Any]:
    """What tells the model from others; the place of its folder does not matter."""
    if exam.endpoint is not None:
        return exam.endpoint.describe()
    storage = Storage(str(exam.model))
    if not storage.exists("rayva.json"):
        raise WeightsError(
            f"{exam.model} is no model folder", "give a model folder, a run, or models:/NAME@ALIAS"
        )
    return {"fingerprint": fingerprint(storage), "precision": exam.replicas.precision}


def fingerprint(storage: Storage) -> str:
    """sha256 over the names and sizes of all files and their first and last MiB.

    Weights of other training differ everywhere, so that this tells models apart without reading all of them.
    """
    found = hashlib.sha256()
    for name, size in storage.files().items():
        found.update(f"/{name}\0{size}\0".encode())
        with storage.open(name) as file:
            found.update(file.read(_EDGE))
            if size > _EDGE:
                file.seek(max(_EDGE, size - _EDGE))
                found.update(file.read(_EDGE))
    return found.hexdigest()


def _claim(exam: Exam, identity: Mapping[str, Any], storage: Storage) -> None:
    """Writes what this evaluation is of; refuses a storage that is another model's."""
    tasks: dict[str, Any] = {}
    if storage.exists(EVALUATION):
        before = storage.read_json(EVALUATION)
        if before.get("identity") != identity:
            raise DataError(
                f"{storage.root} holds the evaluation of another model ({before.get('model')}), or in "
                "another precision",
                "choose another --out",
            )
        tasks = before["tasks"]
    tasks |= {task.name: task.settings.model_dump(mode="json") for task in exam.tasks}
    about = {
        "model": exam.shown,
        "identity": identity,
        "tasks": tasks,
        "sampling": {"temperature": exam.temperature, "top_p": exam.top_p, "seed": exam.seed,
                     "max_new_tokens": exam.max_new_tokens, "limit": exam.limit},
        "judge": exam.judge and exam.judge.describe(),
        "code": code_version(),
    }  # fmt: skip
    storage.write_json(EVALUATION, about)


def _check_second(tasks: Sequence[Task]) -> None:
    """Reads the predictions of ScienceQA's second model before anything is asked."""
    for task in tasks:
        if isinstance(task, ScienceQA) and task.settings.second is not None:
            second = read_predictions(task.settings.second, "scienceqa.second")
            require_second(task.problems(), second, known=second.ids)  # other splits do no harm


def _drawn(items: list[Item], exam: Exam) -> list[Item]:
    """The items, or `limit` questions drawn from them (with all items of each)."""
    if exam.limit is None:
        return items
    ids = list(dict.fromkeys(item.question_id for item in items))
    if len(ids) <= exam.limit:
        return items
    kept = set(random.Random(exam.seed).sample(ids, exam.limit))
    return [item for item in items if item.question_id in kept]


def _sampled(task: Task, exam: Exam) -> Sampled:
    limit = exam.max_new_tokens or task.settings.max_new_tokens
    if exam.temperature == 0:
        return Sampled(limit)
    return Sampled(limit, exam.temperature, exam.top_p, exam.seed)


def _require_distinct(questions: Iterable[Asked]) -> None:
    seen: set[tuple[str, str]] = set()
    for one in questions:
        name = (one.task, one.item.item_id)
        if name in seen:
            raise DataError(f"{one.task} has the question {one.item.item_id!r} twice", "check its files")
        seen.add(name)


def _answer(exam: Exam, questions: Sequence[Asked], storage: Storage) -> dict[tuple[str, str], Answered]:
    """Answers to all questions by task and item; those that are kept are not asked again."""
    store = AnswerStore(storage)
    kept = store.load(questions)
    done = {key for key, answer in kept.items() if not answer.error}
    todo = [one for one in questions if one.key not in done]
    say(f"evaluate: {len(questions):,} questions, {len(questions) - len(todo):,} answered before")
    unique = list({one.key: one for one in todo}.values())
    if unique:
        if exam.endpoint is not None:
            _ask_endpoint(exam.endpoint, unique, store, failed_before=kept)
        else:
            from rayva.orchestration.answering import answer_all

            answer_all(str(exam.model), unique, storage, exam.replicas)
        kept = store.load(questions)
    return {(one.task, one.item.item_id): kept[one.key] for one in questions}


def _ask_endpoint(
    model: ChatModel, questions: Sequence[Asked], store: AnswerStore, failed_before: Container[str]
) -> None:
    """Every answer is on the storage before the next question takes its place."""
    waiting: dict[str, list[Asked]] = {}
    doubtful: set[str] = set()

    with Progress("evaluate", len(questions), "answers") as progress:

        def keep(one: Asked, text: str = "", error: str = "") -> None:
            store.add([Answered(one.task, one.item.item_id, one.key, text, error)])
            progress.advance()

        def requests() -> Iterator[ChatRequest]:
            for one in questions:
                try:
                    messages = tuple(api_messages(one.item))
                except BadImage as error:
                    keep(one, error=str(error))
                    continue
                request = ChatRequest(model.model, messages, _api_sampling(one.sampled))
                waiting.setdefault(request.digest, []).append(one)
                if one.key in failed_before:
                    doubtful.add(request.digest)
                yield request

        def told(request: ChatRequest, reply: ChatAnswer | str) -> None:
            one = waiting[request.digest].pop()
            if isinstance(reply, str):
                keep(one, error=reply)
            else:
                keep(one, text=reply.text)

        model.ask_all(requests(), told, doubtful=doubtful)


def _api_sampling(sampled: Sampled) -> Sampling:
    if sampled.temperature == 0:
        return Sampling(temperature=0.0, max_tokens=sampled.max_new_tokens)
    return Sampling(sampled.temperature, sampled.top_p, sampled.max_new_tokens, sampled.seed)


def api_messages(item: Item) -> list[dict[str, Any]]:
    """An item's conversation in the API's form, its pictures as data URIs where they stand.

    Raises:
        BadImage: a picture cannot be read.
    """
    pictures = iter(item.pictures)
    messages = []
    for message in item.messages:
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if not isinstance(part, str):
                uri = data_uri(_content(next(pictures)))
                parts.append({"type": "image_url", "image_url": {"url": uri}})
            elif part.strip():
                parts.append({"type": "text", "text": part.strip()})
        plain = "".join(str(part["text"]) for part in parts) if message.num_images == 0 else None
        messages.append({"role": message.role, "content": parts if plain is None else plain})
    return messages


def _content(picture: Picture) -> bytes:
    return picture.content if picture.content is not None else read_image_bytes(str(picture.uri))


def _score(
    task: Task,
    items: Sequence[Item],
    answers: Mapping[tuple[str, str], Answered],
    exam: Exam,
    storage: Storage,
) -> dict[str, Any]:
    given = {item.item_id: answers[task.name, item.item_id] for item in items}
    texts = {item_id: answer.text for item_id, answer in given.items() if not answer.error}
    errors = {item_id: answer.error for item_id, answer in given.items() if answer.error}
    if errors:
        say(
            f"warning: {task.name}: {len(errors)} questions could not be asked; {next(iter(errors.values()))}"
        )
    storage.write_bytes(f"{task.name}/answers.jsonl", lines(_answer_rows(items, given, exam)))
    result = _result(task, items, texts, exam, storage)
    result.figures["could_not_be_asked"] = len(errors)
    write_result(storage, task.name, result, _places(task.name, items, storage))
    return result.figures


def _result(
    task: Task, items: Sequence[Item], texts: Mapping[str, str], exam: Exam, storage: Storage
) -> Result:
    asked_items = [item for item in items if item.item_id in texts]
    if not asked_items:
        return Result({"task": task.name, "questions": len(items), "missing": len(items)}, [])
    if exam.judge is not None and task.name == LlavaBench.name:
        return review(cast(LlavaBench, task), texts, exam.judge, storage, exam.compat)
    result = task.score(asked_items, texts)
    if isinstance(task, ScienceQA) and task.settings.second is not None:
        result.figures["ensemble"] = _ensemble(task, asked_items, texts, exam, storage)
    return result


def _ensemble(
    task: ScienceQA, items: Sequence[Item], texts: Mapping[str, str], exam: Exam, storage: Storage
) -> dict[str, Any]:
    """ScienceQA together with a second model's predictions, of the questions that were asked."""
    ids = {item.item_id for item in items}
    problems = [problem for problem in task.problems() if problem.problem_id in ids]
    first = Predictions("the answers", dict(texts))
    second = read_predictions(str(task.settings.second), "scienceqa.second").only(ids)
    if task.settings.ensemble == "complement":
        return complement(problems, first, second)
    verdicts = None
    if exam.judge is not None:
        verdicts = decide(problems, first, second, exam.judge, storage, task.name)
    return judged(problems, first, second, verdicts)


def _answer_rows(items: Sequence[Item], given: Mapping[str, Answered], exam: Exam) -> list[dict[str, Any]]:
    """Rows as the original's scripts write them: question_id, prompt, text, answer_id, model_id, metadata."""
    rows = []
    for item in items:
        answer = given[item.item_id]
        if answer.error:
            continue
        rows.append(
            {
                "question_id": item.item_id,
                "prompt": prompt_rows(item.messages)[-1]["content"],
                "messages": prompt_rows(item.messages),
                "images": [picture.name for picture in item.pictures],
                "text": answer.text,
                "answer_id": answer.key[:22],
                "model_id": exam.shown,
                "metadata": dict(item.facts),
            }
        )
    return rows


def _places(task: str, items: Sequence[Item], storage: Storage) -> dict[str, str]:
    """Where each picture is, by its name; pictures that are in no file are put beside the rows."""
    places: dict[str, str] = {}
    present = set(storage.list(f"{task}/pictures"))
    for picture in (picture for item in items for picture in item.pictures):
        if picture.name in places:
            continue
        if picture.content is None:
            places[picture.name] = str(picture.uri)
            continue
        name = base64.urlsafe_b64encode(hashlib.sha256(picture.content).digest()[:15]).decode()
        if name not in present:
            storage.write_bytes(f"{task}/pictures/{name}", picture.content)
            present.add(name)
        places[picture.name] = f"{task}/pictures/{name}"
    return places


def _report(exam: Exam, figures: Mapping[str, Any], storage: Storage) -> None:
    comparison = compare([read_run(storage.root)])
    page = render(comparison, load_pictures(comparison))
    storage.write_bytes("report.html", page.encode(errors="backslashreplace"))
    storage.write_json("intervals.json", as_json(comparison)["figures"])
    say(f"evaluate: report: {storage.uri('report.html')}")
    if exam.tracking_uri == "none":
        return
    from rayva.tracking.reports import log_report

    about = storage.read_json(EVALUATION)
    place = log_report(
        storage,
        exam.tracking_uri,
        exam.experiment,
        str(about["model"]),
        params={"model": about["model"], "identity": about["identity"], "sampling": about["sampling"],
                "judge": about["judge"] or {}, "tasks": about["tasks"], "replicas": asdict(exam.replicas)},
        metrics=dict(_numbers(figures)),
        artifacts=["report.html", "metrics.json"],
    )  # fmt: skip
    say(f"evaluate: logged to {place}")


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number of nested figures as task/section/name."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{key}/")
        elif isinstance(value, (int, float)):
            yield key, float(value)
