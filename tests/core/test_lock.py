"""One job at a time writes a storage root, and a killed one does not stand in the way."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayva import lock
from rayva.errors import StorageError
from rayva.lock import LOCK, JobLock, LockLost
from rayva.steps import AttemptClock, StepFolder
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


def test_ctrl_c_under_a_lock_is_ctrl_c(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as caught, JobLock(storage):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        time.sleep(500)
    assert not isinstance(caught.value, LockLost)
    assert not storage.exists(LOCK)


def test_refreshes_that_fail_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01)
    storage = Storage(str(tmp_path))
    folder = StepFolder(storage, "data", "0" * 64)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with JobLock(storage) as held, AttemptClock(folder, every=0.01) as clock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            # No file can be opened now: an OSError that is no `StorageError`.
            with pytest.raises(OSError, match="Too many open files"):
                storage.read_bytes(LOCK)
            time.sleep(0.2)  # some refreshes fail
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for thread in (held._thread, clock._thread):
            assert thread.is_alive()
        refreshed = storage.read_json(LOCK)["refreshed"]
        seconds = folder.attempts()[0]
        while storage.read_json(LOCK)["refreshed"] <= refreshed or folder.attempts()[0] <= seconds:
            time.sleep(0.01)  # the test's own limit ends this


@pytest.mark.parametrize("kind", ["taken over", "removed"])
def test_a_job_that_has_lost_its_lock_stops_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    storage = Storage(str(tmp_path))
    other = {"host": "elsewhere", "pid": 7, "process_start": "1", "since": 0.0, "what": "recipe smol"}
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01)
    held = JobLock(storage)
    with pytest.raises(StorageError, match="has lost its hold on") as caught, held:  # noqa: PT012
        with held._exclusive():
            storage.delete(LOCK)
            if kind == "taken over":
                storage.write_json(LOCK, {**other, "refreshed": time.time()})
        time.sleep(500)  # as a step that is at work: it is interrupted
    assert isinstance(caught.value.__cause__, LockLost)
    assert signal.getsignal(signal.SIGINT) is before
    if kind == "taken over":
        assert "process 7 on elsewhere (recipe smol)" in str(caught.value)
        assert storage.read_json(LOCK)["pid"] == 7
    else:
        assert "is gone" in str(caught.value)
        assert not storage.exists(LOCK)


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
