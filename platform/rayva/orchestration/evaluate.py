"""The step `evaluate`: held-out questions with the right image, a wrong one, and none; gate and report.

Answers are kept batch by batch, so that an interrupted step asks nothing twice. The batches do not
depend on the cluster, and neither do the answers. A question that does not fit the model's context is left
out under all conditions, and counted.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rayva.data.schema import Question
from rayva.data.tables import read_records
from rayva.evaluation.gate import decide
from rayva.evaluation.grounding import GATE_TASK, Ask, batches, plan_asks
from rayva.evaluation.metrics import ANSWERS, Answer, accuracies, grounding_figures, tally
from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.orchestration.report import Evaluated, write_report
from rayva.progress import Progress, say
from rayva.recipes.schema import Recipe
from rayva.steps import StepFolder
from rayva.storage import Storage

if TYPE_CHECKING:
    from rayva.training.dataset import FeatureReader

_PARTS = "parts"
_BATCHES_PER_REPLICA = 4
"""Fewer do not pay for loading another copy of the model."""


def run(ctx: StepContext) -> StepResult:
    """Asks, scores, decides and reports; writes answers.parquet, metrics.json, report.html and pictures."""
    evaluation = ctx.recipe.evaluation
    questions = read_records(ctx.storage, ctx.inputs["data"].join("questions.parquet"), Question)
    keys = _image_keys(ctx)
    plan = plan_asks(questions, keys, evaluation.max_questions, evaluation.seed)
    answers, too_long = _whole(_answer_all(ctx, batches(plan.asks, evaluation.batch_size)))
    left_out = plan.left_out | ({"too_long": too_long} if too_long else {})
    if too_long:
        say(
            f"  evaluate: {too_long:,} questions left out: with an answer of evaluation.max_new_tokens "
            f"({evaluation.max_new_tokens}) they do not fit the model's context."
        )
    _write_answers(ctx, answers)
    grounding = grounding_figures(answers)
    decision = decide(grounding, evaluation)
    outputs = {
        "grounding": grounding,
        "by_kind": accuracies(tally((a for a in answers if a.ask.question.task == GATE_TASK), "kind")),
        "tasks": accuracies(tally(answers, "task")),
        "left_out": left_out,
        "passed": decision.passed,
        "why": decision.why,
    }
    ctx.storage.write_json(ctx.folder.join("metrics.json"), outputs)
    artifacts = write_report(ctx, Evaluated(answers, decision, outputs))
    say(f"  evaluate: {decision.why} Report: {ctx.storage.uri(ctx.folder.join('report.html'))}")
    metrics = _flat_metrics(outputs)
    ctx.tracker.job.metrics(metrics)  # the job's run is what people compare
    return StepResult(outputs, metrics, artifacts)


def _image_keys(ctx: StepContext) -> dict[str, str]:
    table = _table(ctx.storage, ctx.inputs["features"].join("image_keys.parquet"))
    return dict(zip(table["image_id"].to_pylist(), table["key"].to_pylist(), strict=True))


def _table(storage: Storage, rel: str, **options: Any) -> pa.Table:
    with storage.open(rel) as file:
        return pq.read_table(file, **options)


def _write_answers(ctx: StepContext, answers: Sequence[Answer]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([answer.row() for answer in answers], schema=ANSWERS), sink)
    ctx.storage.write_bytes(ctx.folder.join("answers.parquet"), sink.getvalue())


def _flat_metrics(outputs: dict[str, Any]) -> dict[str, float]:
    """Figures for the tracker; MLflow allows slashes in names."""
    grounding = outputs["grounding"]
    names = ("accuracy", "accuracy_shuffled_images", "accuracy_no_image")
    metrics = {f"grounding/{name}": float(grounding[name]) for name in names}
    for task, figures in outputs["tasks"].items():
        if task != GATE_TASK:
            metrics |= {f"task/{task}/{name}": float(value) for name, value in figures.items()}
    return metrics | {"passed": float(outputs["passed"])}


@dataclass(frozen=True)
class Exam:
    """What a replica needs to answer."""

    recipe: Recipe
    storage: Storage
    data: StepFolder
    features: StepFolder
    finetune: StepFolder


class _Replica:
    """A resident model on one actor."""

    def __init__(self, exam: Exam, threads: int) -> None:
        import torch

        from rayva.model.folder import load_assistant
        from rayva.training.precision import resolve_precision

        torch.set_num_threads(threads)
        evaluation = exam.recipe.evaluation
        device = torch.device("cuda" if evaluation.gpus > 0 else "cpu")
        dtype, _ = resolve_precision(exam.recipe.finetune.precision, device)
        self._exam = exam
        self._assistant = load_assistant(exam.storage.localize(exam.finetune.join("model")), device, dtype)

    def ready(self) -> None:
        """Returns once the model is loaded."""

    @functools.cached_property
    def _features(self) -> FeatureReader:
        from rayva.features.store import FeatureStore
        from rayva.training.dataset import StoredFeatures
        from rayva.training.inline import InlineFeatures

        exam, outputs = self._exam, self._exam.features.outputs
        keys = _table(exam.storage, exam.features.join("image_keys.parquet"))
        if outputs["store"] is None:
            questions = _table(exam.storage, exam.data.join("questions.parquet"), columns=["image_id"])
            wanted = [("image_id", "in", set(questions["image_id"].to_pylist()))]
            images = _table(exam.storage, exam.data.join("images.parquet"), filters=wanted)
            data = exam.recipe.data
            return InlineFeatures(images, self._assistant.tower, data.max_pixels, data.max_bytes)
        store = FeatureStore.open(exam.storage, outputs["store"])
        by_image = dict(zip(keys["image_id"].to_pylist(), keys["key"].to_pylist(), strict=True))
        return StoredFeatures(store.read, by_image, outputs["tokens"])

    def answer(self, asks: Sequence[Ask]) -> list[str | None]:
        """Greedy answers to a batch; None to what does not fit the model's context."""
        fits = [self._fits(ask) for ask in asks]
        fitting = [ask for ask, fit in zip(asks, fits, strict=True) if fit]
        features = iter(self._features.read([ask.image_id for ask in fitting if ask.image_id is not None]))
        shown = [[next(features)] if ask.image_id is not None else [] for ask in fitting]
        prompts = [ask.messages() for ask in fitting]
        limit = self._exam.recipe.evaluation.max_new_tokens
        texts = iter(self._assistant.answer_batch(prompts, shown, limit))
        return [next(texts) if fit else None for fit in fits]

    def _fits(self, ask: Ask) -> bool:
        """Whether question and answer fit; a model without a limit of its own gets what it was trained on."""
        recipe = self._exam.recipe
        context = self._assistant.model.context or recipe.conversation.max_tokens
        return self._assistant.prompt_length(ask.messages()) + recipe.evaluation.max_new_tokens <= context


def _whole(answered: Sequence[tuple[Ask, str | None]]) -> tuple[list[Answer], int]:
    """The answers to questions that fit under every condition, and how many questions do not.

    The image takes positions too: a question may fit without it alone, and would shift the comparison.
    """
    too_long = {ask.question.question_id for ask, text in answered if text is None}
    answers = [
        Answer(ask, text)
        for ask, text in answered
        if text is not None and ask.question.question_id not in too_long
    ]
    return answers, len(too_long)


def _answer_all(ctx: StepContext, planned: Sequence[Sequence[Ask]]) -> list[tuple[Ask, str | None]]:
    """Answers to all batches; those of an earlier attempt are read, not asked again."""
    texts: dict[int, list[str | None]] = {}
    for number, asks in enumerate(planned):
        part = ctx.folder.join(_PARTS, f"{number:06d}.json")
        rows = ctx.storage.read_json(part) if ctx.storage.exists(part) else []
        # The batch size may have changed since: then these are answers to other questions.
        if [tuple(row[:3]) for row in rows] == [_identity(ask) for ask in asks]:
            texts[number] = [row[3] for row in rows]
    todo = {number: asks for number, asks in enumerate(planned) if number not in texts}
    total, done = sum(map(len, planned)), sum(map(len, texts.values()))
    with Progress("evaluate", total, "answers", done=done) as progress:
        for number, answered in _answered(ctx, todo):
            rows = [[*_identity(ask), text] for ask, text in zip(planned[number], answered, strict=True)]
            ctx.storage.write_json(ctx.folder.join(_PARTS, f"{number:06d}.json"), rows)
            texts[number] = answered
            progress.advance(len(answered))
    return [
        (ask, text)
        for number, asks in enumerate(planned)
        for ask, text in zip(asks, texts[number], strict=True)
    ]


def _identity(ask: Ask) -> tuple[str, str, str | None]:
    return ask.question.question_id, ask.condition, ask.image_id


def _answered(ctx: StepContext, todo: dict[int, Sequence[Ask]]) -> Iterator[tuple[int, list[str | None]]]:
    """Answers of each batch as they come, from as many replicas as the cluster has room for.

    A replica that has no room yet gets no batch, and the step ends without it.
    """
    if not todo:
        return
    exam = Exam(ctx.recipe, ctx.storage, ctx.inputs["data"], ctx.inputs["features"], ctx.inputs["finetune"])
    replicas = _start_replicas(exam, len(todo))
    waiting = list(todo)[::-1]
    running: dict[Any, tuple[Any, int | None]] = {
        replica.ready.remote(): (replica, None) for replica in replicas
    }
    left = len(todo)
    try:
        while left:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            replica, number = running.pop(reference)
            answered = ray.get(reference)
            if waiting:
                following = waiting.pop()
                running[replica.answer.remote(todo[following])] = (replica, following)
            if number is not None:
                left -= 1
                yield number, answered
    finally:
        for replica in replicas:
            ray.kill(replica)


def _start_replicas(exam: Exam, num_batches: int) -> list[Any]:
    scaling, gpus = exam.recipe.scaling, exam.recipe.evaluation.gpus
    cpus = max(1.0, scaling.cpus_per_worker)
    total = ray.cluster_resources()
    room = total.get("GPU", 0.0) / gpus if gpus else total.get("CPU", 0.0) / cpus
    wanted = -(-num_batches // _BATCHES_PER_REPLICA)
    actor = ray.remote(_Replica).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=scaling.max_failures,
        max_task_retries=scaling.max_failures,
        scheduling_strategy="SPREAD",
    )
    count = min(max(int(room), scaling.min_workers), wanted)
    return [actor.remote(exam, int(cpus)) for _ in range(count)]
