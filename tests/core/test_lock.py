"""One job at a time writes a storage root, and a killed one does not stand in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayva import lock
from rayva.errors import StorageError
from rayva.lock import LOCK, JobLock
from rayva.storage import Storage

HOLD = """
import sys, time
from rayva.lock import JobLock
from rayva.storage import Storage
with JobLock(Storage(sys.argv[1]), "recipe tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "platform"},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_job_is_told_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StorageError, match="Another job") as caught, JobLock(Storage(str(tmp_path))):
        pass
    assert str(holder.pid) in str(caught.value)
    assert "recipe tiny" in str(caught.value)
    assert "--storage" in str(caught.value)


def test_a_killed_jobs_lock_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with JobLock(Storage(str(tmp_path))):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_zombie_does_not_hold_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)  # and not waited for: the process number is still taken
    deadline = time.monotonic() + 30
    while lock._process_start(holder.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with JobLock(Storage(str(tmp_path))):
        pass


def test_the_lock_goes_with_the_job(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with JobLock(storage):
        assert storage.exists(LOCK)
    assert not storage.exists(LOCK)
    with JobLock(storage):
        pass


def test_a_reused_process_number_is_not_the_old_job(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with JobLock(storage):
        holder = storage.read_json(LOCK)
    storage.write_json(LOCK, {**holder, "process_start": "1"})
    with JobLock(storage):
        assert storage.read_json(LOCK)["process_start"] == holder["process_start"]


@pytest.mark.parametrize(("age", "stale"), [(1.0, False), (lock.STALE_SECONDS + 1, True)])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_another_machines_lock_holds_while_it_is_refreshed(
    tmp_path: Path, kind: str, age: float, stale: bool
) -> None:
    storage = Storage(str(tmp_path) if kind == "local" else f"memory://lock-{tmp_path.name}-{stale}")
    with JobLock(storage):
        holder = storage.read_json(LOCK)
    storage.write_json(LOCK, {**holder, "host": "elsewhere", "refreshed": time.time() - age})
    if stale:
        with JobLock(storage):
            pass
    else:
        with pytest.raises(StorageError, match="on elsewhere"), JobLock(storage):
            pass


RACE = """
import os, sys
from rayva.lock import JobLock
from rayva.storage import Storage
print("ready", flush=True)
while not os.path.exists(sys.argv[2]): pass
with JobLock(Storage(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    go = tmp_path / "go"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path / "run"), str(go)],
            env={**os.environ, "PYTHONPATH": "platform"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(4)
    ]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    go.touch()
    # The winner holds on until it is let go; the others give up by themselves.
    deadline = time.monotonic() + 60
    while sum(job.poll() is None for job in jobs) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    said = [job.communicate()[0] for job in jobs if job.poll() is not None]
    winners = [job for job in jobs if job.poll() is None]
    assert said == ["", "", ""]
    assert [winner.communicate()[0] for winner in winners] == ["held\n"]
