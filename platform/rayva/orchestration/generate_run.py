"""A run of instruction generation: contexts in, LLaVA JSON with provenance out, and a report."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayva.data.locations import absolute
from rayva.data.schema import ImageRecord, Question
from rayva.errors import DataError, RecipeError
from rayva.evaluation.grounding import GATE_TASK
from rayva.instruct.contexts import BadContext, Context, from_coco, from_images, read_contexts
from rayva.instruct.generator import Attempt, Outcome
from rayva.instruct.prompts import PromptSet
from rayva.instruct.tasks import KINDS, Task, plan_tasks
from rayva.instruct.teachers import Requests, endpoint_of
from rayva.llm.cache import AnswerCache
from rayva.llm.prices import Price, Prices
from rayva.lock import JobLock
from rayva.orchestration import generate_training as training
from rayva.orchestration.generate_batch import write_batch_files
from rayva.orchestration.generate_costs import Costs, costs_of, find_price, price_of
from rayva.orchestration.generate_report import GenerationReport, render_report
from rayva.provenance import code_version
from rayva.recipes import Recipe, to_dict
from rayva.recipes.schema import Generation
from rayva.steps import AttemptClock, StepFolder, step_digest
from rayva.storage import Storage
from rayva.tracking.mlflow_tracker import JobTracker, send_kept

if TYPE_CHECKING:
    pass

_SPEED = {
    "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "max_cost", "prices", "api_key_env",
    "base_url", "input", "coco_captions", "coco_instances", "prompts",
}  # fmt: skip
"""Settings that do not decide the result; files count with their content instead."""

_INPUTS = {"jsonl": {"input"}, "coco": {"coco_captions", "coco_instances"}, "dataset": set[str]()}
"""Settings that name files, by the source that reads them."""


@dataclass
class Inputs:
    """What a run starts from."""

    contexts: list[Context]
    bad: Counter[str]
    first_bad: str = ""
    """The first context that cannot be used, and why."""
    images: dict[str, ImageRecord] = field(default_factory=dict)
    """Pictures of a built-in dataset, by the name that its contexts have; others stay where they are."""
    held_out: list[Question] = field(default_factory=list)
    """The built-in dataset's questions about its test images ..."""
    held_out_images: dict[str, ImageRecord] = field(default_factory=dict)
    """... and these images, by id."""


@dataclass(frozen=True)
class Plan:
    """A run before anything is asked."""

    recipe: Recipe
    storage: Storage
    folder: StepFolder
    inputs: Inputs
    tasks: list[Task]
    prompts: PromptSet

    @property
    def settings(self) -> Generation:
        return self.recipe.generation


def make_plan(recipe: Recipe, storage: Storage) -> Plan:
    """Reads the contexts and decides what is to be written, and where.

    Raises:
        RecipeError: a setting that is missing or does not fit.
        DataError: an input that cannot be read, or that has no usable context.
    """
    settings = recipe.generation
    prompts = PromptSet.load(settings.prompts)
    _check_teacher(settings, prompts)
    inputs = _read_inputs(recipe)
    if not inputs.contexts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in inputs.bad.items()) or "it is empty"
        example = f"; the first, {inputs.first_bad}" if inputs.first_bad else ""
        raise DataError(
            f"The input has no usable context ({reasons}{example})", "each needs an image and captions"
        )
    tasks = plan_tasks(inputs.contexts, settings.kinds, settings.samples, settings.seed)
    what = {key: value for key, value in to_dict(recipe)["generation"].items() if key not in _SPEED}
    made_from = {
        "contexts": _digest(inputs.contexts),
        **{f"prompts {kind}": prompts.digest(kind) for kind in KINDS},
    }
    if inputs.held_out:
        made_from["held out"] = _digest(inputs.held_out)
    folder = StepFolder(storage, "generate", step_digest("generate", what, made_from))
    return Plan(recipe, storage, folder, inputs, tasks, prompts)


def _check_teacher(settings: Generation, prompts: PromptSet) -> None:
    """Complains about the teacher's settings before anything is read or started."""
    if settings.teacher != "symbolic":
        Requests(settings, prompts)
    if settings.teacher == "endpoint":
        endpoint_of(settings)
    price_of(settings)


def _digest(records: Sequence[Context | Question]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def _read_inputs(recipe: Recipe) -> Inputs:
    settings = recipe.generation
    given = [name for name in ("input", "coco_captions", "coco_instances") if getattr(settings, name)]
    if strange := [name for name in given if name not in _INPUTS[settings.source]]:
        raise RecipeError(
            f"generation.{strange[0]} is given, but generation.source={settings.source} does not read it",
            "give --input FILE; or --coco-captions FILE, with --coco-instances FILE for the boxes; or "
            "--input scenes",
        )
    if settings.source == "dataset":
        return _dataset_inputs(recipe)
    found: Iterable[Context | BadContext]
    if settings.source == "coco":
        if settings.coco_captions is None:
            raise RecipeError("generation.source=coco needs generation.coco_captions", "give captions_*.json")
        instances = settings.coco_instances
        found = from_coco(absolute(settings.coco_captions), absolute(instances) if instances else None)
    else:
        if settings.input is None:
            raise RecipeError(
                "There is no input for the teacher",
                "give --input FILE with rows of {id, image, captions, instances}, "
                "or generation.source=dataset",
            )
        found = read_contexts(absolute(settings.input))
    contexts, bad, seen, first_bad = [], Counter[str](), set(), ""
    for context in found:
        if isinstance(context, BadContext):
            bad[context.reason] += 1
            first_bad = first_bad or f"{context.row}: {context.detail or context.reason}"
        elif context.id in seen:
            bad["repeated_id"] += 1
            first_bad = first_bad or f"{context.id}: its id has come before"
        else:
            seen.add(context.id)
            contexts.append(context)
    return Inputs(contexts, bad, first_bad)


def _dataset_inputs(recipe: Recipe) -> Inputs:
    from rayva.orchestration.data import load_bundle

    bundle = load_bundle(recipe.data)
    images = list(bundle.images)
    train = [image for image in images if image.split == "train"]
    tested = {image.image_id: image for image in images if image.split == "test"}
    held_out = [q for q in bundle.questions if q.task == GATE_TASK and q.image_id in tested]
    contexts, bad = [], Counter[str]()
    for context in from_images(train):
        if isinstance(context, BadContext):
            bad[context.reason] += 1
        else:
            contexts.append(context)
    asked = {q.image_id for q in held_out}
    tested = {name: image for name, image in tested.items() if name in asked}
    return Inputs(contexts, bad, "", {image.image_id: image for image in train}, held_out, tested)


@dataclass(frozen=True)
class Forecast:
    """What the calls that are still to be made would take; tokens are estimates."""

    kind: str
    samples: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def forecast(plan: Plan) -> list[Forecast]:
    """Counts, tokens and dollars by kind, without asking anything.

    Prompts are counted at four bytes a token; answers are taken to be as long as those of the examples.
    """
    settings = plan.settings
    if settings.teacher == "symbolic":
        counts = Counter(task.kind for task in plan.tasks)
        return [Forecast(kind, counts[kind], 0, 0, 0, 0.0) for kind in KINDS]
    requests = Requests(settings, plan.prompts)
    cache = AnswerCache(plan.storage)
    price = Prices.load(settings.prices).find(requests.model)
    rows = []
    for kind in KINDS:
        tasks = [task for task in plan.tasks if task.kind == kind]
        asked = [requests.of(task) for task in tasks]
        waiting = {request.digest: request for request in asked if cache.get(request) is None}
        new = list(waiting.values())  # contexts that are alike are asked about once
        prompt = sum(request.estimated_prompt_tokens() for request in new)
        answer = _example_tokens(new[0].messages) if new else 0
        completion = len(new) * min(answer, settings.max_tokens)
        cost = None if price is None else price.of(prompt, completion)
        known = sum(request.digest not in waiting for request in asked)
        rows.append(Forecast(kind, len(tasks), known, prompt, completion, cost))
    cache.close()
    return rows


def _example_tokens(messages: Sequence[dict[str, Any]]) -> int:
    """How long the examples' answers are on average."""
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    return sum(len(text.encode()) // 4 for text in answers) // max(1, len(answers))


def run(plan: Plan, start: bool = True) -> dict[str, Any]:
    """Asks the teacher and writes the outputs; returns the summary.

    The folder is finished, and not run again, once every task is accepted or rejected. Until then the
    outputs hold what there is.
    """
    from rayva.orchestration.console import serving_recipe
    from rayva.orchestration.generate import Work, run_tasks, write_tasks
    from rayva.orchestration.startup import start_ray

    storage, folder = plan.storage, plan.folder
    storage.check_writable()
    with JobLock(storage, "instruction generation"):
        if (manifest := folder.manifest()) is not None:
            send_kept(plan.recipe, storage)
            return {**manifest["outputs"], "finished_before": True}
        work = Work(plan.settings, storage)
        with AttemptClock(folder) as clock, _tracked(plan) as tracker:
            write_tasks(storage, folder.join("tasks.parquet"), plan.tasks)
            start_ray(serving_recipe(plan.recipe.serving), storage)
            outcomes = dict(run_tasks(work, folder.join("tasks.parquet"), len(plan.tasks)))
            summary = write_outputs(plan, outcomes, clock.seconds)
            if plan.settings.teacher == "batch":
                # None, and the old ones go, where all is answered.
                summary["batch"] = asdict(write_batch_files(plan, outcomes, price_of(plan.settings)))
            tracker.metrics(_metrics(summary))
            for name in ("report.html", "samples.parquet", "rejects.parquet"):
                tracker.artifact(folder.join(name))
        if not summary["unfinished"]:
            about = {
                "recipe": plan.recipe.name,
                "settings": to_dict(plan.recipe)["generation"],
                "inputs": {},
                "code": code_version(),
            }
            folder.finish(summary, _metrics(summary), clock.seconds, about)
        return summary


@contextlib.contextmanager
def _tracked(plan: Plan) -> Iterator[Any]:
    tracker = JobTracker(plan.recipe, plan.storage)
    try:
        with tracker.step("generate", plan.folder, {}):
            yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    tracker.close("FINISHED")


_FIGURES = ("samples", "rejected_answers", "cost", "cost_at_most", "lost_calls")


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    figures = {f"generate/{name}": float(summary[name]) for name in _FIGURES if summary[name] is not None}
    figures |= {f"generate/kind/{kind}": float(n) for kind, n in summary["by_kind"].items()}
    return figures | {f"generate/rejected/{why}": float(n) for why, n in summary["reasons"].items()}


_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_NAMES = [("id", pa.string()), ("image", pa.string()), ("kind", pa.string())]
_PROVENANCE = [
    ("teacher", pa.string()), ("model", pa.string()), ("prompt_digest", pa.string()),
    ("attempt", pa.int64()), ("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64()),
    ("cost", pa.float64()), ("seconds", pa.float64()), ("time", pa.float64()),
]  # fmt: skip
_SAMPLES = pa.schema([*_NAMES, ("conversations", pa.list_(_TURN)), *_PROVENANCE])
_REJECTS = pa.schema(
    [*_NAMES, ("reason", pa.string()), ("detail", pa.string()), ("text", pa.string()), *_PROVENANCE]
)


def write_outputs(plan: Plan, outcomes: dict[int, Outcome], seconds: float) -> dict[str, Any]:
    """Writes samples.json (LLaVA's form), samples.parquet, rejects.parquet and report.html."""
    price = find_price(plan.settings)
    accepted, rejected = [], []
    for number, task in enumerate(plan.tasks):
        outcome = outcomes[number]
        for tried, attempt in enumerate(outcome.attempts):
            about = _provenance(plan, task, tried, attempt, price)
            base = {"id": task.task_id, "image": _image_name(plan, task.context), "kind": task.kind}
            if attempt.reason:
                why = {"reason": attempt.reason, "detail": attempt.detail, "text": attempt.answer.text}
                rejected.append({**base, **why, **about})
            else:
                accepted.append({**base, "conversations": _conversation(outcome), **about})
    summary = _summary(plan, outcomes, accepted, rejected, costs_of(plan, outcomes, price))
    llava = [{key: row[key] for key in ("id", "image", "conversations")} for row in accepted]
    training.write_rows(plan.folder, "samples.json", llava)
    _write_table(plan, "samples.parquet", accepted, _SAMPLES)
    _write_table(plan, "rejects.parquet", rejected, _REJECTS)
    _write_training_files(plan)
    plan.storage.write_bytes(
        plan.folder.join("report.html"), _report(plan, summary, accepted, rejected, seconds).encode()
    )
    return summary


def _conversation(outcome: Outcome) -> list[dict[str, str]]:
    turns = []
    for number, pair in enumerate(outcome.pairs):
        prefix = "" if number else "<image>\n"
        turns += [{"from": "human", "value": prefix + pair.question}, {"from": "gpt", "value": pair.answer}]
    return turns


def _provenance(plan: Plan, task: Task, tried: int, attempt: Attempt, price: Price | None) -> dict[str, Any]:
    settings, answer = plan.settings, attempt.answer
    digest = ""
    if settings.teacher != "symbolic":
        digest = Requests(settings, plan.prompts).of(task, tried).prompt_digest
    return {
        "teacher": settings.teacher, "model": answer.model, "prompt_digest": digest, "attempt": tried,
        "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
        "cost": None if price is None else price.of_answer(answer),
        "seconds": answer.seconds, "time": answer.created,
    }  # fmt: skip


def _summary(
    plan: Plan,
    outcomes: dict[int, Outcome],
    accepted: Sequence[Any],
    rejected: Sequence[Any],
    costs: Costs,
) -> dict[str, Any]:
    statuses = Counter(outcome.status for outcome in outcomes.values())
    errors = Counter(o.error[:120] for o in outcomes.values() if o.status == "failed")
    return {
        "tasks": len(plan.tasks),
        "samples": len(accepted),
        "by_kind": dict(Counter(row["kind"] for row in accepted)),
        "statuses": dict(statuses),
        "rejected_answers": len(rejected),
        "reasons": dict(Counter(row["reason"] for row in rejected).most_common()),
        "errors": dict(errors.most_common(5)),
        "bad_contexts": dict(plan.inputs.bad),
        "empty_boxes": sum(context.empty_boxes for context in plan.inputs.contexts),
        **asdict(costs),
        "unfinished": statuses["failed"] + statuses["stopped"] + statuses["waiting"],
        "json": plan.storage.uri(plan.folder.join("samples.json")),
        "images": plan.storage.uri(plan.folder.join(training.IMAGES)) if plan.inputs.images else None,
        "train": plan.storage.uri(plan.folder.join(training.SETTINGS)),
        "report": plan.storage.uri(plan.folder.join("report.html")),
    }


def _write_table(plan: Plan, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    plan.storage.write_bytes(plan.folder.join(name), sink.getvalue())


def _image_name(plan: Plan, context: Context) -> str:
    """The image's name in samples.json: its own, or that of the file beside it."""
    record = plan.inputs.images.get(context.image)
    return context.image if record is None else _file_name(record)


def _file_name(record: ImageRecord) -> str:
    kinds = {b"\x89PNG": "png", b"RIFF": "webp"}
    return f"{record.image_id.replace('/', '-')}.{kinds.get((record.content or b'')[:4], 'jpg')}"


def _write_training_files(plan: Plan) -> None:
    """Stage 1, the gate's questions and the pictures of a built-in dataset, and the settings for full.py."""
    inputs, folder = plan.inputs, plan.folder
    named = ((context, _image_name(plan, context)) for context in inputs.contexts)
    training.write_rows(folder, training.CAPTIONS, training.caption_rows(named, plan.settings.seed))
    training.write_images(folder, training.IMAGES, {_file_name(i): i for i in inputs.images.values()})
    if inputs.held_out:
        names = {image_id: _file_name(image) for image_id, image in inputs.held_out_images.items()}
        training.write_rows(folder, training.HELD_OUT, training.held_out_rows(inputs.held_out, names))
        pictures = {_file_name(image): image for image in inputs.held_out_images.values()}
        training.write_images(folder, training.HELD_OUT_IMAGES, pictures)
    training.write_settings(folder, bool(inputs.images), bool(inputs.held_out))


def _report(
    plan: Plan,
    summary: dict[str, Any],
    accepted: Sequence[dict[str, Any]],
    rejected: Sequence[dict[str, Any]],
    seconds: float,
) -> str:
    pictures = {_file_name(record): record.content for record in plan.inputs.images.values()}
    captions = {_image_name(plan, task.context): task.context.captions for task in plan.tasks}
    report = GenerationReport(
        title=f"Instruction data by {plan.settings.model or plan.settings.teacher}",
        summary=summary,
        accepted=accepted,
        rejected=rejected,
        seconds=seconds,
        picture=pictures.get,
        contexts=captions,
    )
    return render_report(report)
