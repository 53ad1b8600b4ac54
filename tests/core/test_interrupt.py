"""Ctrl-C, SIGTERM and kill -9 of a running job: finished work stays, and the job says how to go on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayva.lock import LOCK, JobLock
from rayva.storage import Storage

pytestmark = pytest.mark.slow

JOB = [sys.executable, "tests/core/job.py"]
SLOW = {**os.environ, "PYTHONPATH": "platform:.", "PAUSE": "600", "PYTHONUNBUFFERED": "1"}
FAST = {**SLOW, "PAUSE": "0"}


def start_and_wait_for_training(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*JOB, "--storage", str(root), *arguments]
    process = subprocess.Popen(command, env=SLOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(root.glob("steps/train-*/count.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_prints_the_command_that_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    root = tmp_path / "a run"
    process = start_and_wait_for_training(root, "--force", "data", "finetune.lr=3e-4")
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "[1/3] data: done" in said
    command = errors.strip().splitlines()[-1].strip()
    assert "--force" not in command, "what was forgotten once must not be forgotten again"
    done = subprocess.run(command, shell=True, env=FAST, capture_output=True, text=True, check=True)
    assert "[1/3] data: finished before" in done.stdout
    assert "goes on where it stopped" in done.stdout
    assert (root / "ran.txt").read_text().split() == ["data", "train", "train", "evaluate"]
    assert Storage(str(root)).read_json("summary.json")["grounding"]["accuracy"] == 0.9


@pytest.mark.parametrize("name", ["demo", "full", "data"])
def test_every_script_tells_its_own_command(tmp_path: Path, name: str) -> None:
    command = [
        sys.executable,
        f"pipelines/{name}.py",
        "--storage",
        str(tmp_path / "a run"),
        "finetune.epochs=2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a run" / LOCK).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert shlex.split(errors.strip().splitlines()[-1]) == command


WHILE_RAY_IS_IMPORTED = """
import signal, sys
from rayva.orchestration import entry
from tests.core import job

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ray.client_builder":
            signal.raise_signal(signal.SIGINT)

def start(recipe, storage):
    sys.meta_path.insert(0, Finder())
    import ray

raise SystemExit(entry.main(steps=job.STEPS, start=start, open_tracker=job.Tracker, argv=sys.argv[1:]))
"""


def test_a_job_stopped_while_ray_is_imported_says_no_more_than_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WHILE_RAY_IS_IMPORTED, "--storage", str(tmp_path)]
    done = subprocess.run(command, env=FAST, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr
    assert done.stderr.startswith("\nStopped.")


def test_a_killed_job_goes_on_without_repeating_finished_work(tmp_path: Path) -> None:
    process = start_and_wait_for_training(tmp_path)
    process.kill()
    process.communicate()
    done = subprocess.run(
        [*JOB, "--storage", str(tmp_path)], env=FAST, capture_output=True, text=True, check=True
    )
    assert "[1/3] data: finished before" in done.stdout
    assert (tmp_path / "ran.txt").read_text().split() == ["data", "train", "train", "evaluate"]
    assert not list(tmp_path.glob("**/*.tmp"))
    again = subprocess.run(
        [*JOB, "--storage", str(tmp_path)], env=FAST, capture_output=True, text=True, check=True
    )
    assert "All 3 steps are finished; there is nothing to do." in again.stdout


HASTY = """
import runpy, sys
from rayva import lock
lock.REFRESH_SECONDS = 0.05
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_job_that_another_has_taken_over_stops_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HASTY, "tests/core/job.py", "--storage", str(tmp_path)]
    process = subprocess.Popen(command, env=SLOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("steps/train-*/count.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    storage = Storage(str(tmp_path))
    other = {"host": "elsewhere", "pid": 7, "process_start": "1", "since": 0.0, "what": "recipe smol"}
    with JobLock(storage)._exclusive():  # not between the job's look and its write
        storage.write_json(LOCK, {**other, "refreshed": time.time()})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"error: This job has lost its hold on {tmp_path}")
    assert "process 7 on elsewhere (recipe smol)" in errors
    assert "Traceback" not in errors
    assert storage.read_json(LOCK)["pid"] == 7


def test_a_running_job_keeps_a_second_one_out(tmp_path: Path) -> None:
    process = start_and_wait_for_training(tmp_path)
    second = subprocess.run(
        [*JOB, "--storage", str(tmp_path)], env=FAST, capture_output=True, text=True, check=False
    )
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith("error: Another job")
