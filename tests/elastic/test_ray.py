"""Real faults under Ray Train in mid-epoch: kill -9 of a worker, of the driver, and of a whole node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayva.storage import Storage
from rayva.training.store import CheckpointStore, StoredCheckpoint
from tests.elastic.support import PATIENCE_SECONDS, ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

STEPS = 80
# What a stage trains, by name; adapters would be one line more.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {"zero": 2}),
    "finetune": ("finetune", {"zero": 3}),
}


class Job:
    """A driver and its cluster."""

    def __init__(self, root: Path, stage: str, workers: Any, steps: int, **settings: Any) -> None:
        self.root, self._arguments = root, [stage, json.dumps(workers), str(steps), json.dumps(settings)]
        root.mkdir()
        self.start()

    def start(self) -> None:
        self._home = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        command = [sys.executable, "-m", "tests.elastic.ray_driver", str(self.root), *self._arguments]
        with (self.root / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment() | {"RAY_TMPDIR": self._home}, stdout=log, stderr=log
            )

    def processes(self) -> Iterator[tuple[int, str]]:
        """Number and name of every process of this cluster, the driver left out."""
        mark = f"RAY_TMPDIR={self._home}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes() and int(folder.name) != self._process.pid:
                    yield int(folder.name), (folder / "cmdline").read_bytes().decode()
            except OSError:
                continue

    def kill_driver(self) -> None:
        """With it goes its whole cluster, as in a machine's failure."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for number, _ in list(self.processes()):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def kill_worker(self) -> None:
        number = next(number for number, name in self.processes() if "RayTrainWorker" in name)
        os.kill(number, signal.SIGKILL)

    def ask(self, what: str) -> None:
        (self.root / what).touch()

    def checkpoints(self) -> list[StoredCheckpoint]:
        storage = Storage(str(self.root))
        stages = [name for name in storage.list("steps") if name.startswith(self._arguments[0])]
        store = CheckpointStore(storage, f"steps/{stages[0]}/attempts/saved", 1, 0) if stages else None
        return [c for c in store.checkpoints() if c.progress()] if store else []

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def wait_for_more_checkpoints(self) -> None:
        newest = max((c.step for c in self.checkpoints()), default=0)
        self.wait_for(lambda: any(c.step > newest for c in self.checkpoints()))

    def finish(self) -> None:
        assert self._process.wait(timeout=PATIENCE_SECONDS) == 0, self.log()

    def log(self) -> str:
        return (self.root / "log.txt").read_text()[-6000:]

    def told(self) -> list[dict[int, float]]:
        """Losses by step that each driver told its tracker."""
        files = sorted(self.root.glob("told-*.jsonl"))
        return [dict(json.loads(line) for line in file.read_text().splitlines()) for file in files]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []

    def start(name: str, *arguments: Any, **settings: Any) -> Job:
        started.append(Job(tmp_path / name, *arguments, **settings))
        return started[-1]

    yield start
    for job in started:
        job.kill_driver()


@pytest.mark.parametrize("case", STAGES)
def test_a_killed_worker_node_and_driver_leave_no_trace_in_the_losses(
    case: str, jobs: Callable[..., Job]
) -> None:
    stage, settings = STAGES[case]
    whole = jobs("whole", stage, 2, STEPS, **settings)
    whole.finish()
    (expected,) = whole.told()
    assert sorted(expected) == list(range(1, STEPS + 1))
    job = jobs("killed", stage, 2, STEPS, **settings)
    job.wait_for_more_checkpoints()
    job.kill_worker()
    job.wait_for_more_checkpoints()
    job.ask("lose")
    job.ask("grow")
    job.wait_for_more_checkpoints()
    job.kill_driver()
    job.start()
    job.finish()
    before, after = job.told()
    assert {step: expected[step] for step in before} == before
    assert {step: expected[step] for step in after} == after
    assert sorted(before | after) == list(range(1, STEPS + 1)), "a step was skipped"
    results = [json.loads(next(run.root.glob("result-*.json")).read_text()) for run in (whole, job)]
    counts = [{key: result[key] for key in ("samples", "tokens", "supervised_tokens")} for result in results]
    assert counts[0] == counts[1], "a sample was counted twice or not at all"


def test_training_shrinks_and_grows_with_the_cluster(jobs: Callable[..., Job]) -> None:
    whole = jobs("whole", "finetune", 2, 400, zero=3)
    whole.finish()
    (expected,) = whole.told()
    job = jobs("elastic", "finetune", [1, 2], 400, zero=3)

    def saved_by(workers: int) -> bool:
        newest = next(iter(job.checkpoints()), None)
        progress = newest.progress() if newest else None
        return progress is not None and progress.world_size == workers

    job.wait_for(lambda: saved_by(2))
    job.ask("lose")
    job.wait_for(lambda: saved_by(1))
    job.ask("grow")
    job.wait_for(lambda: saved_by(2))
    job.finish()
    (told,) = job.told()
    assert told == pytest.approx(expected, rel=1e-5)


def test_a_notice_of_preemption_saves_at_once(jobs: Callable[..., Job]) -> None:
    job = jobs("drained", "finetune", 2, 4000, checkpoint_every=100_000)
    job.wait_for(lambda: any(job.told()))
    assert not job.checkpoints()
    job.ask("drain")
    job.wait_for(job.checkpoints)
