"""Stage 2 under Ray Train: killed with -9 at the driver or the worker, it ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayva.model.folder import load_assistant
from rayva.training.checkpoint import manifest_name

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 500

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]


def _start(root: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    root.mkdir(exist_ok=True)
    with (root / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.stage_driver", str(root), str(workers)],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip


def _finish(driver: subprocess.Popen[bytes], root: Path) -> None:
    assert driver.wait(timeout=PATIENCE_SECONDS) == 0, (root / "log.txt").read_text()[-5000:]


def _checkpoints(root: Path) -> Iterator[Path]:
    return root.glob(f"steps/finetune-*/attempts/*/checkpoint_*/{manifest_name(0)}")


def _wait_for_checkpoint(driver: subprocess.Popen[bytes], root: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(_checkpoints(root)):
        assert driver.poll() is None, (root / "log.txt").read_text()[-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _workers_of(driver: subprocess.Popen[bytes]) -> list[int]:
    """Processes named as Ray Train names its workers, among the driver's descendants."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    family = {driver.pid}
    for _ in range(4):
        family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
    return [int(pid) for pid, _, args in rows if int(pid) in family and "RayTrainWorker" in args]


def _weights(root: Path) -> dict[str, bytes]:
    (model,) = root.glob("steps/finetune-*/model")
    return {path.name: path.read_bytes() for path in sorted(model.rglob("*.safetensors"))}


def _told(root: Path) -> list[int]:
    """Steps that reached the tracker of the driver that finished."""
    (told,) = root.glob("told-*.txt")
    return [int(step) for step in told.read_text().split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage root of an uninterrupted run."""
    root = tmp_path_factory.mktemp("stage") / "whole"
    _finish(_start(root), root)
    return root


def test_every_step_is_told_and_the_model_answers(whole: Path) -> None:
    assert _told(whole) == list(range(1, 61))
    (model,) = whole.glob("steps/finetune-*/model")
    assistant = load_assistant(model)
    assert assistant.settings.conversation.template == "v1"
    assert not list(whole.glob("steps/finetune-*/attempts"))


def test_a_killed_driver_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    driver = _start(root)
    _wait_for_checkpoint(driver, root)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert any(_checkpoints(root))
    again = _start(root)
    _finish(again, root)
    steps = _told(root)
    assert steps[0] > 1
    assert steps == list(range(steps[0], 61))
    assert _weights(root) == _weights(whole)


def test_a_killed_worker_is_replaced_and_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    driver = _start(root)
    _wait_for_checkpoint(driver, root)
    (worker,) = _workers_of(driver)
    os.kill(worker, signal.SIGKILL)
    _finish(driver, root)
    steps = _told(root)
    assert steps == list(range(steps[0], 61))  # the worker may have died before its first report
    assert steps[0] % 5 == 1
    assert _weights(root) == _weights(whole)
