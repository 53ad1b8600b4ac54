"""The tracker against MLflow itself: a SQLite store, and a server that dies in mid-run and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayva.orchestration.pipeline import make_plan, run_job
from rayva.recipes import resolve
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from rayva.tracking.address import TrackingError
from rayva.tracking.mlflow_tracker import JobTracker
from rayva.tracking.outbox import SPOOL
from tests.core.job import STEPS, nothing

pytestmark = pytest.mark.slow
_START_SECONDS = 180


class MlflowServer:
    """`mlflow server` on SQLite, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **quiet}, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._healthy():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server, running or not; each test starts and kills it as it needs, in an experiment of its own."""
    shared = MlflowServer(tmp_path_factory.mktemp("server"))
    yield shared
    shared.kill()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def folder(storage: Storage, name: str = "pretrain") -> StepFolder:
    return StepFolder(storage, name, step_digest(name, {}, {}))


def tracker(storage: Storage, *overrides: str) -> JobTracker:
    return JobTracker(resolve("tiny", None, list(overrides)), storage)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs(api: Any, experiment_name: str = "rayva") -> dict[str, Any]:
    """All runs by name; names are unique in these tests."""
    experiment = api.get_experiment_by_name(experiment_name).experiment_id
    found = api.search_runs([experiment])
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def steps(api: Any, run_id: str, key: str = "loss") -> Counter[int]:
    return Counter(metric.step for metric in api.get_metric_history(run_id, key))


def log(job: JobTracker, first: int, last: int) -> None:
    for step in range(first, last):
        job.metrics({"loss": 1 / (1 + step), "lr": 0.1}, step)


def _interrupted_step(job: JobTracker, step: StepFolder, data: StepFolder) -> None:
    with job.step("pretrain", step, {"data": data}):
        log(job, 0, 10)
        raise KeyboardInterrupt


def test_a_server_that_dies_in_mid_run_gets_every_metric_once(
    server: MlflowServer, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    uri = server.uri.replace("http://", "http://ann:s3cret@")
    job = tracker(storage, f"tracking.uri={uri}", "tracking.experiment=dies")
    with job.step("pretrain", folder(storage), {}):
        log(job, 0, 50)
        assert job.flush(120)
        log(job, 50, 75)
        server.kill()  # with some of the metrics on their way
        log(job, 75, 100)
        assert job.flush(120) is False
        assert storage.list(SPOOL) != []
        with pytest.raises(TrackingError, match="cannot be reached"):
            job.register_model("m", "/model", {"rayva.digest": "d"}, {}, champion=False)
        server.start()
        log(job, 100, 150)
    job.close("FINISHED")
    assert storage.list(SPOOL) == []
    found = runs(client(server.uri), "dies")
    assert steps(client(server.uri), found["pretrain"].info.run_id) == Counter(range(150))
    assert found["pretrain"].data.tags["mlflow.parentRunId"] == found["tiny"].info.run_id
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert capsys.readouterr().err.count("cannot be reached") == 1
    everything = b"".join(path.read_bytes() for path in Path(storage.root).rglob("*") if path.is_file())
    everything += b"".join(path.read_bytes() for path in server.folder.rglob("*") if path.is_file())
    assert b"s3cret" not in everything


def test_a_job_that_starts_and_ends_without_its_server_is_sent_by_the_next_one(
    server: MlflowServer, storage: Storage
) -> None:
    server.kill()
    job = tracker(storage, f"tracking.uri={server.uri}", "tracking.experiment=late")
    with job.step("pretrain", folder(storage), {}):
        log(job, 0, 10)
    assert job.info()["run_id"] is None
    job.close("FAILED")
    server.start()
    job = tracker(storage, f"tracking.uri={server.uri}", "tracking.experiment=late")
    with job.step("pretrain", folder(storage), {}):
        log(job, 5, 20)  # goes on from a checkpoint: some steps a second time
        storage.write_bytes(folder(storage).join("curves", "loss.png"), b"png")
        job.artifact(folder(storage).join("curves", "loss.png"))
    registered = job.register_model("m", f"{storage.root}/model", {"rayva.digest": "d"}, {}, champion=True)
    job.close("FINISHED")
    api = client(server.uri)
    found = runs(api, "late")
    run_id = found["pretrain"].info.run_id
    assert steps(api, run_id) == Counter(range(20))
    assert [file.path for file in api.list_artifacts(run_id, "curves")] == ["curves/loss.png"]
    version = api.get_model_version_by_alias("m", "champion")
    assert version.version == registered.version
    assert version.tags["rayva.model"] == f"{storage.root}/model"
    assert version.run_id == found["tiny"].info.run_id
    assert [f.path for f in api.list_artifacts(version.run_id, "model")] == ["model/rayva-model.json"]


def test_a_finished_job_started_again_sends_what_was_kept(
    server: MlflowServer, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kill()
    recipe = resolve("tiny", None, [f"tracking.uri={server.uri}", "tracking.experiment=kept"])

    def start() -> None:
        run_job(recipe, storage, steps=STEPS, start=nothing, tell=lambda line: None)

    start()
    assert storage.list(SPOOL) != []
    start()  # in vain
    assert "wait in" in capsys.readouterr().err
    assert storage.list(SPOOL) != []
    assert storage.read_json("summary.json")["mlflow"]["run_id"] is None
    server.start()
    start()
    assert storage.list(SPOOL) == []
    found = runs(client(server.uri), "kept")
    assert storage.read_json("summary.json")["mlflow"] == {
        "tracking_uri": server.uri,
        "experiment": "kept",
        "run_id": found["tiny"].info.run_id,
    }
    assert set(found) == {"tiny", "data", "train", "evaluate"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["data"].data.metrics == {"images": 3.0}
    capsys.readouterr()
    start()
    assert capsys.readouterr().err == "", "nothing is left to send"


def test_a_resumed_job_goes_on_in_the_same_runs_and_a_forgotten_step_gets_a_new_one(
    storage: Storage,
) -> None:
    data = folder(storage, "data")
    job = tracker(storage)
    with pytest.raises(KeyboardInterrupt):
        _interrupted_step(job, folder(storage), data)
    first, uri = job.run_id, job.uri
    job.close("KILLED")
    api = client(uri)
    killed = runs(api)
    assert {run.info.status for run in killed.values()} == {"KILLED"}

    job = tracker(storage)
    with job.step("pretrain", folder(storage), {"data": data}):
        log(job, 5, 20)
    assert job.run_id == first
    job.close("FINISHED")
    found = runs(api)
    assert {name: run.info.run_id for name, run in found.items()} == {
        name: run.info.run_id for name, run in killed.items()
    }
    step = found["pretrain"]
    assert step.info.status == "FINISHED"
    assert steps(api, step.info.run_id) == Counter(range(20))
    assert step.data.tags["rayva.digest"] == folder(storage).digest
    (dataset,) = step.inputs.dataset_inputs
    assert dataset.dataset.name == "data"
    assert data.digest.startswith(dataset.dataset.digest)
    assert data.digest in dataset.dataset.source
    assert found["tiny"].data.params["finetune.lr"] == str(resolve("tiny").finetune.lr)
    assert found["tiny"].data.params["conversation.template"] == "v1"

    folder(storage).forget()
    job = tracker(storage, "finetune.lr=0.5")  # another job
    with job.step("pretrain", folder(storage), {}):
        log(job, 0, 3)
    assert job.run_id != first
    job.close("FINISHED")
    experiment = api.get_experiment_by_name("rayva").experiment_id
    assert Counter(run.info.run_name for run in api.search_runs([experiment])) == {"tiny": 2, "pretrain": 2}


def test_runs_can_be_told_apart_by_their_data(storage: Storage, tmp_path: Path) -> None:
    rows = tmp_path / "captions.jsonl"
    rows.write_text('{"image": "a.png", "caption": "a dog"}\n')
    recipe = resolve("tiny", None, ["data.source=captions", f"data.captions={rows}"])
    read, train, _ = STEPS
    parts = (replace(read, fingerprint="rayva.orchestration.data:fingerprint"), train)

    def start(until: str) -> None:
        run_job(recipe, storage, until=until, steps=parts, start=nothing, tell=lambda line: None)

    def inputs(run: Any) -> list[tuple[str, str, str]]:
        found = [(one.dataset, one.tags[0].value) for one in run.inputs.dataset_inputs]
        return sorted((data.name, json.loads(data.source)["uri"], context) for data, context in found)

    start("data")
    start("train")
    made = runs(client(f"sqlite:///{storage.root}/mlflow.db"))
    data, _ = make_plan(recipe, storage, parts)
    place = storage.uri(data.folder.rel)
    assert inputs(made["data"]) == [("data", place, "output"), ("data.captions", str(rows), "data")]
    assert inputs(made["train"]) == [("data", place, "train")]
    assert inputs(made["tiny"]) == [("data", place, "input")]
    [dataset] = made["tiny"].inputs.dataset_inputs
    assert data.folder.digest.startswith(dataset.dataset.digest)


def test_aliases_long_values_and_registering_twice(storage: Storage) -> None:
    job = tracker(storage)
    job.params({"long": "x" * 10_000, "section": {"key": [1, 2]}})
    job.tag("note", "y" * 20_000)
    model = f"{storage.root}/model"
    first = job.register_model("m", model, {"rayva.digest": "1"}, {"gate": "yes"}, champion=True)
    assert (first.version, first.aliases) == ("1", ("candidate", "champion"))
    second = job.register_model("m", model, {"rayva.digest": "2"}, {}, champion=False)
    assert (second.version, second.aliases) == ("2", ("candidate",))
    again = job.register_model("m", model, {"rayva.digest": "2"}, {}, champion=False)
    assert again == second
    job.close("FINISHED")
    api = client(job.uri)
    assert api.get_model_version_by_alias("m", "champion").version == 1
    assert api.get_model_version_by_alias("m", "candidate").version == 2
    assert api.get_model_version_by_alias("m", "champion").source == model
    run = runs(api)["tiny"]
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith(" ...")
    assert run.data.params["section.key"] == "[1, 2]"
    assert len(run.data.tags["note"]) == 8000
    assert not [path for path in Path(storage.root).rglob("*") if path.suffix in {".pkl", ".pickle"}]


def test_a_deleted_experiment_is_a_clear_error(storage: Storage) -> None:
    job = tracker(storage)
    job.close("FINISHED")
    api = client(job.uri)
    api.delete_experiment(api.get_experiment_by_name("rayva").experiment_id)
    job = tracker(storage)
    with pytest.raises(TrackingError, match="has been deleted"):
        job.close("FINISHED")
