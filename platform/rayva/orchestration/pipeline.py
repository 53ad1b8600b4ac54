"""The job: which steps there are, what each reads, and how they are run, skipped and resumed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rayva.errors import RayvaError
from rayva.lock import JobLock
from rayva.orchestration.faults import user_error
from rayva.orchestration.summary import build_summary, write_summary
from rayva.progress import duration, say
from rayva.provenance import code_version
from rayva.recipes import Recipe, require_runnable, to_dict
from rayva.recipes.schema import StageName
from rayva.redaction import redact
from rayva.steps import RECIPE, AttemptClock, StepFolder, step_digest
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, tracking_uri
from rayva.tracking.mlflow_tracker import JobTracker, send_kept
from rayva.tracking.registry import aliases_now


@dataclass
class StepContext:
    """What a step is given."""

    recipe: Recipe
    storage: Storage
    folder: StepFolder
    inputs: dict[str, StepFolder]
    """The finished folders of the steps that this one needs."""
    tracker: JobTracker


@dataclass
class StepResult:
    """What a step hands back: `outputs` are JSON data for later steps, `artifacts` files for the tracker."""

    outputs: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    """Paths relative to the storage root."""


Settings = Callable[[Recipe], dict[str, Any]]


def pick(*keys: str, without: Sequence[str] = ()) -> Settings:
    """The slice of a recipe with these keys (sections or single settings), less those in `without`."""

    def settings(recipe: Recipe) -> dict[str, Any]:
        flat = {key: value for key, value in _flatten(to_dict(recipe)) if _under(key, keys)}
        return {key: value for key, value in flat.items() if not _under(key, without)}

    return settings


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


@dataclass(frozen=True)
class Step:
    """One step of the job.

    Attributes:
        settings: the slice of the recipe that decides the result. What only changes the speed stays out.
        run: "module:function" with `(StepContext) -> StepResult`; imported when the step runs.
        fingerprint: "module:function" with `(Recipe) -> dict`, for input that lies outside the storage;
            must be quick to import, since it also decides whether a finished step still holds.
        version: raised when the step's code makes something else of the same input.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    settings: Settings
    run: str
    fingerprint: str | None = None
    version: int = 1


def _data(recipe: Recipe) -> dict[str, Any]:
    """The data step's slice, where weights of a mix decide nothing. Without a mix, it has no key."""
    settings = pick("data")(recipe)
    for key in ("data.pretrain_mix", "data.finetune_mix"):
        mix = settings.pop(key)
        if mix:
            settings[key] = [{k: v for k, v in one.items() if k != "weight"} for one in mix]
    return settings


def _stage(name: StageName) -> Settings:
    """A training stage's slice. How the work is split does not change the result, so it stays out.

    Limits of length that are not given, and weights without a mix, are left out too: what was finished
    before there were such settings still holds.
    """
    split = (
        "micro_batch_size", "packing", "gradient_checkpointing", "compile", "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints", "keep_best",
    )  # fmt: skip
    template = "conversation.template" if name == "pretrain" else "conversation.pretrain_template"
    picked = pick(
        "projector", "conversation", name,
        without=(template, *(f"{name}.{setting}" for setting in split)),
    )  # fmt: skip

    def settings(recipe: Recipe) -> dict[str, Any]:
        limits = (f"{name}.lengths",)
        chosen = {k: v for k, v in picked(recipe).items() if v is not None or not _under(k, limits)}
        weights = {dataset.label: dataset.weight for dataset in recipe.data.datasets(name)}
        return chosen | ({"weights of the mix": weights} if weights else {})

    return settings


_HOME = "rayva.orchestration"
STEPS: tuple[Step, ...] = (
    Step(
        "weights", "fetch or make the vision tower and the language model", (),
        pick(
            "weights",
            "vision.kind", "vision.path", "vision.revision", "language", "weights",
        ),
        f"{_HOME}.weights:run", fingerprint=f"{_HOME}.weights:fingerprint",
    ),
    Step(
        "data", "images, captions, conversations and held-out questions as tables", (), _data,
        f"{_HOME}.data:run", fingerprint=f"{_HOME}.data:fingerprint",
    ),
    Step(
        "features", "encode every image once with the frozen vision tower", ("weights", "data"),
        pick("vision", "features.mode"), f"{_HOME}.features:run",
    ),
    Step(
        "pretrain", "stage 1: align the projector", ("weights", "data", "features"), _stage("pretrain"),
        f"{_HOME}.training:run_pretrain",
    ),
    Step(
        "finetune", "stage 2: instruction tuning", ("weights", "data", "features", "pretrain"),
        _stage("finetune"), f"{_HOME}.training:run_finetune",
    ),
    Step(
        "evaluate", "ask held-out questions with the right image, a wrong one, and none",
        ("data", "features", "finetune"),
        pick("evaluation", without=("evaluation.batch_size", "evaluation.gpus")),
        f"{_HOME}.evaluate:run",
    ),
    Step(
        "export", "write the model as a Hugging Face LLaVA folder", ("finetune",), pick(),
        f"{_HOME}.export:run",
    ),
    Step(
        "register", "put the model into the registry", ("finetune", "evaluate", "export"),
        pick("name", "tracking"), f"{_HOME}.register:run",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A step at its digest for one recipe."""

    step: Step
    folder: StepFolder
    inputs: dict[str, StepFolder]
    settings: dict[str, Any]
    manifest: dict[str, Any] | None
    """None: the step has to run."""
    why: str


def load(path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = path.partition(":")
    return cast(Callable[..., Any], getattr(importlib.import_module(module), function))


def make_plan(recipe: Recipe, storage: Storage, steps: Sequence[Step] = STEPS) -> list[Planned]:
    """Every step's folder, and whether it is finished, without running anything."""
    plan: dict[str, Planned] = {}
    finished_before = _finished_manifests(storage)
    for step in steps:
        settings = {**step.settings(recipe), "version": step.version}
        if step.fingerprint is not None:
            settings |= {f"input {key}": value for key, value in load(step.fingerprint)(recipe).items()}
        inputs = {name: plan[name].folder for name in step.needs}
        digests = {name: folder.digest for name, folder in inputs.items()}
        folder = StepFolder(storage, step.name, step_digest(step.name, settings, digests))
        manifest = folder.manifest()
        why = "finished" if manifest else _why(folder, settings, digests, finished_before.get(step.name))
        plan[step.name] = Planned(step, folder, inputs, settings, manifest, why)
    return list(plan.values())


def _finished_manifests(storage: Storage) -> dict[str, dict[str, Any]]:
    """The latest finished manifest of each step, whatever its settings were."""
    latest: dict[str, dict[str, Any]] = {}
    for folder in storage.list("steps"):
        path = f"steps/{folder}/manifest.json"
        if storage.exists(path):
            manifest = storage.read_json(path)
            name = folder.rpartition("-")[0]
            if name not in latest or manifest["finished"] > latest[name]["finished"]:
                latest[name] = manifest
    return latest


def _why(
    folder: StepFolder, settings: Mapping[str, Any], inputs: Mapping[str, str], before: dict[str, Any] | None
) -> str:
    """Why a step has to run, in words."""
    if attempts := folder.attempts():
        return f"was interrupted after {duration(sum(attempts))}; goes on where it stopped"
    if before is None:
        return "has not run yet"
    old = before["settings"]
    changed = [key for key in {**old, **settings} if old.get(key) != settings.get(key)]
    if changed:
        # What older code finished may have a secret in its settings.
        told = (redact(f"{key} {old.get(key)!r} -> {settings.get(key)!r}") for key in changed[:3])
        return "changed: " + ", ".join(told)
    renewed = [name for name, digest in inputs.items() if before["inputs"].get(name) != digest]
    return f"its input changed: {', '.join(renewed)}" if renewed else "has not run yet"


def select(plan: Sequence[Planned], until: str | None = None, only: str | None = None) -> list[Planned]:
    """The part of the plan up to `until`, or `only` one step with all that it depends on."""
    names = [planned.step.name for planned in plan]
    for name in (until, only):
        if name is not None and name not in names:
            raise RayvaError(f"There is no step {name!r}.", f"choose one of {', '.join(names)}")
    if only is not None:
        wanted = {only}
        for planned in reversed(plan):
            if planned.step.name in wanted:
                wanted.update(planned.step.needs)
        return [planned for planned in plan if planned.step.name in wanted]
    return list(plan[: names.index(until) + 1]) if until is not None else list(plan)


def forget(plan: Sequence[Planned], names: Iterable[str]) -> list[str]:
    """Removes these steps' folders and those of all steps that depend on them; says which."""
    gone = with_dependents(plan, names)
    for planned in plan:
        if planned.step.name in gone:
            planned.folder.forget()
    return gone


def with_dependents(plan: Sequence[Planned], names: Iterable[str]) -> list[str]:
    """These steps and all that depend on them, in the plan's order."""
    found = set(names)
    known = [planned.step.name for planned in plan]
    for name in found - set(known):
        raise RayvaError(f"There is no step {name!r}.", f"choose one of {', '.join(known)}")
    for planned in plan:
        if found.intersection(planned.step.needs):
            found.add(planned.step.name)
    return [name for name in known if name in found]


def _default_tracker(recipe: Recipe, storage: Storage) -> JobTracker:
    return JobTracker(recipe, storage)


def _start(recipe: Recipe, storage: Storage) -> None:
    from rayva.orchestration.startup import start_ray

    tracking_uri(recipe.tracking.uri, storage)  # where it cannot be used, Ray need not start
    start_ray(recipe, storage)


def run_job(
    recipe: Recipe,
    storage: Storage,
    *,
    until: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
    steps: Sequence[Step] = STEPS,
    start: Callable[[Recipe, Storage], None] = _start,
    open_tracker: Callable[[Recipe, Storage], JobTracker] = _default_tracker,
    tell: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Runs what is not finished yet and returns the summary, which is also written to the storage.

    Args:
        until: stops after this step.
        only: runs this step and what it depends on.
        force: steps to forget first, with all that depends on them.
        start: brings Ray up; called only if a step has to run.
        tell: takes each line for people.

    Raises:
        RayvaError: anything that a person can mend; finished steps stay finished.
    """
    require_runnable(recipe)
    storage.check_writable()
    with JobLock(storage, f"recipe {recipe.name}"):
        if force:
            gone = forget(make_plan(recipe, storage, steps), force)
            tell(f"Forgotten, to run again: {', '.join(gone)}.")
        plan = make_plan(recipe, storage, steps)
        wanted = select(plan, until, only)
        todo = [planned for planned in wanted if planned.manifest is None]
        executed: set[str] = set()
        # Also with nothing to do: what serves or shows this run reads the settings that were given last.
        storage.write_json(RECIPE, to_dict(recipe))
        if todo:
            with _faults_for_people(storage):
                _run_steps(recipe, storage, wanted, start, open_tracker, tell, executed)
            plan = make_plan(recipe, storage, steps)
        else:
            tell(f"All {len(wanted)} steps are finished; there is nothing to do.")
            send_kept(recipe, storage)
        made = {planned.step.name: (planned.folder, planned.manifest) for planned in plan}
        summary = build_summary(recipe, storage, made, executed)
        if "register" not in executed:
            _renew_aliases(summary, recipe, storage, tell)
        write_summary(storage, summary)
        return summary


def _renew_aliases(
    summary: dict[str, Any], recipe: Recipe, storage: Storage, tell: Callable[[str], None]
) -> None:
    """Asks the registry which aliases the model has, if this storage has registered another one since."""
    latest = _finished_manifests(storage).get("register")
    shown = summary["stages"].get("register")
    if latest is None or shown is None or latest["digest"] == shown["digest"]:
        return
    model = summary["model"]
    try:
        uri = tracking_uri(recipe.tracking.uri, storage)
        model["aliases"] = aliases_now(uri, model["name"], model["version"])
    except TrackingError as error:
        tell(f"The aliases shown may have gone to a model that was registered later. {error}")


def _run_steps(
    recipe: Recipe,
    storage: Storage,
    wanted: Sequence[Planned],
    start: Callable[[Recipe, Storage], None],
    open_tracker: Callable[[Recipe, Storage], JobTracker],
    tell: Callable[[str], None],
    executed: set[str],
) -> None:
    start(recipe, storage)
    tracker = open_tracker(recipe, storage)
    last = [planned for planned in wanted if planned.manifest is None][-1]
    try:
        for number, planned in enumerate(wanted, start=1):
            name = planned.step.name
            head = f"[{number}/{len(wanted)}] {name}"
            if planned.manifest is not None:
                tell(f"{head}: finished before ({duration(planned.manifest['seconds'])})")
                continue
            tell(f"{head}: {planned.step.about} ({planned.why})")
            seconds = _run_step(recipe, storage, planned, tracker, planned is last)
            executed.add(name)
            tell(f"{head}: done in {duration(seconds)}")
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
        raise
    tracker.close("FINISHED")


def _run_step(recipe: Recipe, storage: Storage, planned: Planned, tracker: JobTracker, last: bool) -> float:
    """Runs one step and writes its manifest. Returns seconds over all attempts."""
    folder = planned.folder
    storage.makedirs(folder.rel)
    with (
        AttemptClock(folder) as clock,
        tracker.step(planned.step.name, folder, planned.inputs),
    ):
        for name, digest, uri in _outside_inputs(recipe, planned):
            tracker.input(name, digest, uri, context=planned.step.name)
        context = StepContext(recipe, storage, folder, planned.inputs, tracker)
        result: StepResult = load(planned.step.run)(context)
        tracker.metrics(result.metrics)
        for artifact in result.artifacts:
            tracker.artifact(artifact)
    # Asking for the run's id waits for the server: the end of the job is soon enough.
    about = described(recipe, planned, tracker.info() if last else None)
    folder.finish(result.outputs, result.metrics, clock.seconds, about)
    return clock.seconds


def _outside_inputs(recipe: Recipe, planned: Planned) -> Iterator[tuple[str, str, str]]:
    """Files and folders outside the storage that a step reads: the setting's name, their digest, where."""
    for key, digest in planned.settings.items():
        setting = key.removeprefix("input ")
        if setting != key and isinstance(uri := _setting(to_dict(recipe), setting), str):
            yield setting, digest, uri


def _setting(settings: Any, key: str) -> Any:
    """What stands under `key` (section.name, or section.name.0.name in a list); None where nothing does."""
    for part in key.split("."):
        if isinstance(settings, Mapping):
            settings = settings.get(part)
        elif isinstance(settings, Sequence) and part.isdigit():
            settings = settings[int(part)]
        else:
            return None
    return settings


def described(recipe: Recipe, planned: Planned, mlflow: Any = None) -> dict[str, Any]:
    """What a finished step's manifest tells beside its outputs."""
    return {
        "recipe": recipe.name,
        "settings": planned.settings,
        "inputs": {name: inputs.digest for name, inputs in planned.inputs.items()},
        "code": code_version(),
        "mlflow": mlflow,
    }


@contextlib.contextmanager
def _faults_for_people(storage: Storage) -> Iterator[None]:
    """Lets the `RayvaError` or the full disk behind a worker's failure come out as itself."""
    try:
        yield
    except Exception as error:
        known = user_error(error, storage.root)
        if known is None or known is error:
            raise
        raise known from error
