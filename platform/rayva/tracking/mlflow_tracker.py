"""The tracker of a job: one MLflow run for the job, nested ones for its steps, across restarts.

Only the driver tracks; workers report to it. Nothing here waits for MLflow: operations go through the
outbox. A job with the same resolved recipe at the same storage goes on in the same runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from rayva.progress import say
from rayva.provenance import code_version
from rayva.recipes import Recipe, to_dict
from rayva.redaction import redact
from rayva.steps import StepFolder
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, tracking_uri
from rayva.tracking.history import HISTORY, History
from rayva.tracking.outbox import SPOOL, Operation, Outbox, kept_for
from rayva.tracking.registry import Place, Registered, register
from rayva.tracking.server import STATE, MlflowServer, read_state

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 60.0
_START_SECONDS = 120.0
DATASET = "data"
"""The step whose result is the job's dataset."""


class Queue(Protocol):
    """Where operations go: see `Outbox`."""

    @property
    def away(self) -> str | None: ...

    @property
    def fault(self) -> Exception | None: ...

    def add(self, *operations: Operation) -> None: ...

    def persist(self) -> None: ...

    def wait(self, timeout: float) -> bool: ...

    def close(self, timeout: float) -> None: ...


Rows = Iterable[tuple[int, Mapping[str, float]]]


class Run:
    """One MLflow run, named by a key of our own; everything is queued and sent in order."""

    def __init__(self, key: str, outbox: Queue, history: History | None = None) -> None:
        self.key = key
        self._outbox, self._history = outbox, history

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs settings; nested ones as `section.key`. Secrets in URIs are masked."""
        self._add("params", values={key: redact(_text(value)) for key, value in flatten(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs figures of one step; what the run has for this step already stays as it is."""
        self.metrics_many([(step, values)])

    def metrics_many(self, rows: Rows) -> None:
        """Logs figures of many steps: (step, figures) each."""
        plain = [(step, {key: float(value) for key, value in values.items()}) for step, values in rows]
        if plain:
            self._add("metrics", rows=plain, time=_now())
        if self._history is not None:
            self._history.add(plain)

    def tag(self, key: str, value: str) -> None:
        self.tags({key: value})

    def tags(self, values: Mapping[str, str]) -> None:
        self._add("tags", values={key: redact(value) for key, value in values.items()})

    def input(self, name: str, digest: str, uri: str, context: str = "input") -> None:
        """Logs a dataset that the run reads: its name, where it lies, and its digest."""
        self._add("input", name=name, digest=digest, uri=redact(uri), context=context)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keeps a file or folder with the run.

        Args:
            path: relative to the storage root, or an absolute local path that stays until it is sent.
            folder: where it goes among the run's artifacts; None keeps its place in the step's folder.
        """
        if folder is None:
            parts = PurePosixPath(path).parts
            folder = "/".join(parts[2:-1]) if parts[0] == "steps" else ""
        self._add("artifact", path=str(path), folder=folder)

    def end(self, status: str) -> None:
        """Marks the run FINISHED, FAILED or KILLED; returns when all of it is on the storage."""
        if self._history is not None:
            self._history.write()
        self._add("status", status=status, time=_now())
        self._outbox.persist()

    def open(self, name: str, parent: str | None) -> None:
        """Makes the run on the server, or goes on in it where it exists."""
        self._add("run", name=name, parent=parent, time=_now())

    def _add(self, op: str, **arguments: Any) -> None:
        operation: Operation = {"op": op, "run": self.key, **arguments}
        self._outbox.add(operation)


class JobTracker:
    """Tracks a job. Also stands for its current run: the step's within `step`, else the job's.

    Args:
        recipe: logged as parameters; its digest decides which job is gone on with.

    Raises:
        TrackingError: recipe.tracking.uri cannot be used.
    """

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        uri = tracking_uri(recipe.tracking.uri, storage)
        self._storage, self._recipe, self._uri = storage, recipe, uri
        self.uri = redact(uri)
        self.experiment = recipe.tracking.experiment
        address = _address(uri, self.experiment)
        key = _job_key(recipe, storage, address)
        self._outbox: Queue = Outbox(storage, MlflowServer(uri, self.experiment, storage), address, self.uri)
        self.job = Run(key, self._outbox)
        """The run of the whole job."""
        self._run = self.job
        self.job.open(recipe.name, None)
        self.job.tags(_tags(recipe))
        self.job.params(to_dict(recipe))
        self._outbox.persist()

    @contextlib.contextmanager
    def step(self, name: str, folder: StepFolder, inputs: Mapping[str, StepFolder]) -> Iterator[Run]:
        """The nested run of a step, which is the current run meanwhile.

        Args:
            folder: the step's folder; an interrupted step's run is gone on with as long as it is there.
            inputs: folders of the steps that it reads, logged as the run's inputs.
        """
        history = History(self._storage, folder.join(HISTORY))
        run = Run(_step_key(folder), self._outbox, history)
        run.open(name, self.job.key)
        run.tags({**_tags(self._recipe), "rayva.step": name, "rayva.digest": folder.digest})
        for needed, source in inputs.items():
            run.input(needed, source.digest, self._storage.uri(source.rel), context=name)
        # One dataset, by name and digest, of the run that made it, of those that read it, and of the job:
        # so MLflow's table groups runs by their data.
        if name == DATASET:
            run.input(DATASET, folder.digest, self._storage.uri(folder.rel), context="output")
        for made in (source for needed, source in {**inputs, name: folder}.items() if needed == DATASET):
            self.job.input(DATASET, made.digest, self._storage.uri(made.rel))
        self._run = run
        try:
            yield run
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            if self._outbox.fault is None:
                run.end("KILLED" if stopped else "FAILED")
            raise
        else:
            run.end("FINISHED")
        finally:
            self._run = self.job

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the job's run; None while the server is away."""
        return self._id(self.job.key)

    @property
    def step_run_id(self) -> str | None:
        """MLflow's id of the current run; None while the server is away."""
        return self._id(self._run.key)

    def _id(self, key: str) -> str | None:
        known: str | None = read_state(self._storage)["runs"].get(key)
        if known is None and self._outbox.away is None:
            self._outbox.wait(_START_SECONDS)
            known = read_state(self._storage)["runs"].get(key)
        return known

    def info(self) -> dict[str, str | None]:
        """What a person needs to find the job in MLflow; free of secrets.

        `job` is the run's own key, by which `with_run_id` finds an id that is not known yet.
        """
        return {
            "tracking_uri": self.uri,
            "experiment": self.experiment,
            "run_id": self.run_id,
            "job": self.job.key,
        }

    def params(self, values: Mapping[str, Any]) -> None:
        self._run.params(values)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._run.metrics(values, step)

    def metrics_many(self, rows: Rows) -> None:
        self._run.metrics_many(rows)

    def tag(self, key: str, value: str) -> None:
        self._run.tag(key, value)

    def input(self, name: str, digest: str, uri: str, context: str = "input") -> None:
        self._run.input(name, digest, uri, context)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self._run.artifact(path, folder)

    def flush(self, timeout: float = _CLOSE_SECONDS) -> bool:
        """Waits until the server has everything; False if it is away."""
        return self._outbox.wait(timeout)

    def register_model(
        self, name: str, model: str, tags: Mapping[str, str], about: Mapping[str, Any], champion: bool
    ) -> Registered:
        """Puts a model into the registry: see `rayva.tracking.registry.register`.

        Raises:
            TrackingError: the server is away.
        """
        self.flush()
        run_id = self.run_id
        if run_id is None:
            raise TrackingError(
                f"The model cannot be registered: {self.uri} cannot be reached ({self._outbox.away}).",
                "start the tracking server and run the same command again; all other steps stay finished",
            )
        place = Place(self._uri, self.experiment, self._storage, run_id)
        return register(place, name, model, tags, about, champion)

    def close(self, status: str) -> None:
        """Ends the job's run as FINISHED, FAILED or KILLED and sends what can be sent.

        A defect of the tracker itself is raised only if nothing else went wrong.
        """
        if self._outbox.fault is not None and status != "FINISHED":
            log.warning("tracking had stopped: %s", self._outbox.fault)
            return
        self.job.end(status)
        self._outbox.close(_CLOSE_SECONDS)


def with_run_id(info: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """What `JobTracker.info` gave, less the key, and with the run's id if the server has the run by now."""
    told = {name: value for name, value in info.items() if name != "job"}
    if told["run_id"] is None and "job" in info:
        told["run_id"] = read_state(storage)["runs"].get(info["job"])
    return told


def send_kept(recipe: Recipe, storage: Storage) -> None:
    """Sends what earlier jobs at this storage could not send; quick where nothing has been kept.

    For a job that has nothing to do, and so opens no run.

    Raises:
        TrackingError: recipe.tracking.uri cannot be used.
    """
    if not storage.list(SPOOL):
        return
    uri, experiment = tracking_uri(recipe.tracking.uri, storage), recipe.tracking.experiment
    address = _address(uri, experiment)
    if kept_for(storage, address):
        say(f"Tracking: sending what an earlier job has kept for {redact(uri)}.")
        Outbox(storage, MlflowServer(uri, experiment, storage), address, redact(uri)).close(_CLOSE_SECONDS)


def _address(uri: str, experiment: str) -> str:
    """Names an experiment of a server in files: a password may change, so it does not count."""
    return hashlib.sha256(f"{redact(uri)} {experiment}".encode()).hexdigest()[:8]


def _job_key(recipe: Recipe, storage: Storage, address: str) -> str:
    """The key of the job with this recipe, server and experiment; new where there has been none."""
    recipe_text = json.dumps(to_dict(recipe), sort_keys=True)
    digest = hashlib.sha256(f"{address} {redact(recipe_text)}".encode()).hexdigest()
    state = read_state(storage)
    if digest not in state["jobs"]:
        state["jobs"][digest] = f"job-{uuid.uuid4().hex}"
        storage.write_json(STATE, state)
    return str(state["jobs"][digest])


def _step_key(folder: StepFolder) -> str:
    """The key of a step's run, kept in its folder: a step that is forgotten gets a new run."""
    rel = folder.join(STATE)
    if not folder.storage.exists(rel):
        folder.storage.write_json(rel, {"run": f"{folder.name}-{uuid.uuid4().hex}"})
    return str(folder.storage.read_json(rel)["run"])


def _tags(recipe: Recipe) -> dict[str, str]:
    code = code_version()
    return {
        "rayva.recipe": recipe.name,
        "rayva.commit": str(code["commit"]),
        "rayva.dirty": str(code["dirty"]),
        "rayva.tree": str(code["tree"]),
        "mlflow.source.git.commit": str(code["commit"]),
    }


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as ("section.key", value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _now() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return time.time_ns() // 1_000_000
