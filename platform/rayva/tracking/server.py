"""Applies queued operations to MLflow, each exactly once, however often they are sent.

Runs carry a key of our own as the tag `rayva.run`: the answer to "create run" may get lost with the
connection, and the run is then found again by its key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rayva.redaction import redact
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, is_server
from rayva.tracking.outbox import Operation, Rejected, ServerAway
from rayva.tracking.sqlite import ensure_tables

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "rayva.run"
STATE = "tracking.json"
"""At the storage root: the keys of the jobs and the MLflow ids of their runs."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # The outbox tries again by itself; MLflow's own seven tries would only delay it by minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_AWAY_CODES = {
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}
_UNSURE_CODES = {"INTERNAL_ERROR"}
"""MLflow's code for a lost connection as well as for a defect of the server."""
_SURE_AFTER = 3

# Limits of MLflow's API.
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250
_DATASET_DIGEST_LENGTH = 36

Result = TypeVar("Result")
Item = TypeVar("Item")


def _quiet() -> None:
    """MLflow reads these when it is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def make_client(uri: str) -> MlflowClient:
    """An MLflow client that keeps to itself: no telemetry, no chatter. The import takes seconds.

    Raises:
        TrackingError: a driver for this kind of database is not installed.
    """
    _quiet()
    from mlflow import MlflowClient

    try:
        ensure_tables(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ImportError as error:
        raise TrackingError(
            f"tracking.uri {redact(uri)!r} needs a package that is missing: {error}.", "install it"
        ) from error


def ask(call: Callable[[], Result], reachable: Callable[[], object]) -> Result:
    """The result of an MLflow call, or why there is none in our terms.

    Args:
        reachable: a call that succeeds whenever the server works at all.

    Raises:
        ServerAway: the server cannot be reached, is overloaded, or refuses us altogether.
        Rejected: the server works, and does not accept this call.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import OperationalError

    for attempt in range(_SURE_AFTER):
        try:
            return call()
        except (RequestException, OperationalError) as error:
            raise ServerAway(_reason(error)) from error
        except MlflowException as error:
            if error.error_code in _AWAY_CODES:
                raise ServerAway(_reason(error)) from error
            if error.error_code not in _UNSURE_CODES or attempt == _SURE_AFTER - 1:
                raise Rejected(_reason(error)) from error
            try:
                reachable()
            except (MlflowException, RequestException) as down:
                raise ServerAway(_reason(down)) from error
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    """The first line of an error, short and without secrets."""
    for cause in (error, error.__cause__, error.__context__):
        if cause is not None and "refused" in str(cause):
            return "connection refused"
    return redact(str(error).strip().partition("\n")[0])[:200]


class MlflowServer:
    """One MLflow experiment. Used by one thread at a time.

    Args:
        uri: tracking URI, secrets included.
        storage: for artifacts by relative path, and for the state file with the runs' ids.
    """

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        self._uri, self._experiment_name, self._storage = uri, experiment, storage
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._runs: dict[str, str] = {}
        """MLflow id of each run that is known to exist on the server, by key."""
        self._seen: dict[tuple[str, str], set[int]] = {}
        """Steps that the server has of each metric, by run id and key."""
        self._new: set[str] = set()
        """Ids of runs made here: they have no metrics but ours."""

    @property
    def client(self) -> MlflowClient:
        """The client; `connect` has made it."""
        assert self._client is not None
        return self._client

    def connect(self) -> None:
        """Finds or makes the experiment; on SQLite this also makes the tables, which takes seconds.

        Raises:
            ServerAway: try again later.
            TrackingError: the store cannot be used as it is.
        """
        _quiet()
        from mlflow.exceptions import MlflowException

        name = self._experiment_name
        try:
            if self._client is None:
                self._client = make_client(self._uri)
            found = self.ask(lambda: self.client.get_experiment_by_name(name))
            if found is None:
                self._experiment = self._create_experiment()
            elif found.lifecycle_stage != "active":
                raise TrackingError(
                    f"The MLflow experiment {name!r} has been deleted.",
                    "restore it (mlflow experiments restore), or set tracking.experiment to another name",
                )
            else:
                self._experiment = found.experiment_id
        except (Rejected, MlflowException) as error:
            raise TrackingError(
                f"The MLflow store {redact(self._uri)} cannot be used: {redact(str(error))}",
                "check tracking.uri; a database made by another version wants `mlflow db upgrade URI`",
            ) from error

    def _create_experiment(self) -> str:
        name = self._experiment_name
        # A server knows where its artifacts belong; a database does not, and MLflow would take ./mlruns.
        place = None if is_server(self._uri) else self._artifact_root()
        try:
            return str(self.ask(lambda: self.client.create_experiment(name, artifact_location=place)))
        except Rejected:
            # Another job may have made it just now.
            found = self.ask(lambda: self.client.get_experiment_by_name(name))
            if found is None:
                raise
            return str(found.experiment_id)

    def _artifact_root(self) -> str:
        path = self._storage.uri("mlartifacts")
        return Path(path).as_uri() if self._storage.is_local else path

    def ask(self, call: Callable[[], Result]) -> Result:
        """`ask` with this experiment as the test of whether the server works."""
        return ask(call, lambda: self.client.get_experiment_by_name(self._experiment_name))

    def run_id(self, key: str) -> str:
        """MLflow's id of the run that the operation `run` has opened."""
        if key not in self._runs:
            known = self._state()["runs"].get(key)
            if known is None:
                raise Rejected(f"run {key} has never been opened")
            self._runs[key] = known
        return self._runs[key]

    def apply(self, operation: Operation) -> None:
        """Carries out one queued operation.

        Raises:
            ServerAway: not, or not known to be, carried out: to be applied again.
            Rejected: it never will be.
        """
        handler: Callable[[Operation], None] = getattr(self, f"_apply_{operation['op']}")
        try:
            handler(operation)
        except ServerAway:
            # What has arrived is unknown: the server will be asked.
            self._seen.clear()
            self._new.clear()
            raise

    def _apply_run(self, operation: Operation) -> None:
        key = operation["run"]
        run = self._find(key)
        if run is None:
            run = self._create(operation)
            self._new.add(run)
        else:
            self.ask(lambda: self.client.update_run(run, status="RUNNING"))
        self._runs[key] = run
        state = self._state()
        if state["runs"].get(key) != run:
            state["runs"][key] = run
            self._storage.write_json(STATE, state)

    def _find(self, key: str) -> str | None:
        query = f"tags.`{RUN_KEY}` = '{key}'"
        found = self.ask(lambda: self.client.search_runs([self._experiment], query, max_results=1))
        return str(found[0].info.run_id) if found else None

    def _create(self, operation: Operation) -> str:
        tags = {RUN_KEY: operation["run"], "mlflow.source.name": "rayva", "mlflow.source.type": "JOB"}
        if operation["parent"] is not None:
            tags["mlflow.parentRunId"] = self.run_id(operation["parent"])
        made = self.ask(
            lambda: self.client.create_run(
                self._experiment, start_time=operation["time"], tags=tags, run_name=operation["name"]
            )
        )
        return str(made.info.run_id)

    def _state(self) -> dict[str, Any]:
        return read_state(self._storage)

    def _apply_params(self, operation: Operation) -> None:
        from mlflow.entities import Param

        run = self.run_id(operation["run"])
        values = operation["values"].items()
        params = [Param(key[:_KEY_LENGTH], shorten(value, _PARAM_LENGTH)) for key, value in values]
        for batch in _batches(params, _PARAMS_PER_BATCH):
            self._log_batch(run, params=batch)

    def _apply_tags(self, operation: Operation) -> None:
        from mlflow.entities import RunTag

        run = self.run_id(operation["run"])
        values = operation["values"].items()
        tags = [RunTag(key[:_KEY_LENGTH], shorten(value, _TAG_LENGTH)) for key, value in values]
        for batch in _batches(tags, _PARAMS_PER_BATCH):
            self._log_batch(run, tags=batch)

    def _apply_metrics(self, operation: Operation) -> None:
        from mlflow.entities import Metric

        run = self.run_id(operation["run"])
        metrics = {
            (step, key): Metric(key, value, operation["time"], step)
            for step, values in operation["rows"]
            for key, value in values.items()
            if step not in self._steps(run, key)
        }
        for batch in _batches(list(metrics.values()), _METRICS_PER_BATCH):
            self._log_batch(run, metrics=batch)
            for metric in batch:
                self._seen[run, metric.key].add(metric.step)

    def _steps(self, run: str, key: str) -> set[int]:
        """Steps that the server has of the metric `key`."""
        if (run, key) not in self._seen:
            known: Iterable[Any] = ()
            if run not in self._new:
                known = self.ask(lambda: self.client.get_metric_history(run, key))
            self._seen[run, key] = {metric.step for metric in known}
        return self._seen[run, key]

    def _log_batch(self, run: str, **what: Sequence[Any]) -> None:
        self.ask(lambda: self.client.log_batch(run, synchronous=True, **what))

    def _apply_input(self, operation: Operation) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run = self.run_id(operation["run"])
        source = json.dumps({"uri": operation["uri"], "digest": operation["digest"]})
        dataset = Dataset(
            name=operation["name"],
            digest=operation["digest"][:_DATASET_DIGEST_LENGTH],
            source_type="rayva",
            source=source,
        )
        tags = [InputTag("mlflow.data.context", operation["context"])]
        self.ask(lambda: self.client.log_inputs(run, datasets=[DatasetInput(dataset, tags)]))

    def _apply_artifact(self, operation: Operation) -> None:
        run, path = self.run_id(operation["run"]), operation["path"]
        if not Path(path).is_absolute() and not self._storage.exists(path):
            raise Rejected(f"the file {path} is gone")
        local = Path(path) if Path(path).is_absolute() else self._storage.localize(path)
        log = self.client.log_artifacts if local.is_dir() else self.client.log_artifact
        try:
            self.ask(lambda: log(run, str(local), operation["folder"] or None))
        except OSError as error:
            raise Rejected(str(error)) from error

    def _apply_status(self, operation: Operation) -> None:
        run, status = self.run_id(operation["run"]), operation["status"]
        self.ask(lambda: self.client.set_terminated(run, status, operation["time"]))


def read_state(storage: Storage) -> dict[str, Any]:
    """The state file: {"jobs": key of each job by its digest, "runs": MLflow id of each run by key}."""
    if not storage.exists(STATE):
        return {"jobs": {}, "runs": {}}
    state: dict[str, Any] = storage.read_json(STATE)
    return state


def shorten(value: str, limit: int) -> str:
    """`value` cut to MLflow's `limit`, with a mark that it is cut."""
    return value if len(value) <= limit else f"{value[: limit - 4]} ..."


def _batches(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
