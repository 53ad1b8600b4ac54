"""The whole job of `tiny`, made small: killed with -9 at several moments, it ends with the same figures."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.small import SMALL_TINY

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = [
    (r"\[1/8\] weights: make|\[1/8\] weights: fetch", 3.0),
    (r"\[3/8\] features: ", 2.0),
    (r"  pretrain: \d", 0.5),
    (r"  finetune: \d", 0.5),
    (r"\[6/8\] evaluate: ", 4.0),
]
"""A line of the job's output, and how many seconds after it the job is killed."""
FEW = [MOMENTS[0], MOMENTS[3], MOMENTS[4]]


def _start(storage: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "pipelines/full.py", "--recipe", "tiny", "--storage", str(storage)]
    return subprocess.Popen(
        [*command, *SMALL_TINY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        bufsize=1, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip


def _run(storage: Path) -> str:
    with _start(storage) as job:
        said = job.stdout.read() if job.stdout else ""
    assert job.returncode == 0, said[-3000:]
    return said


def _killed_at(storage: Path, line: str, seconds: float) -> None:
    with _start(storage) as job:
        said = []
        for printed in job.stdout or ():
            said.append(printed)
            if re.match(line, printed):
                timer = threading.Timer(seconds, os.killpg, (job.pid, signal.SIGKILL))
                timer.start()
                break
        else:
            pytest.fail(f"{line!r} was never printed: {''.join(said)[-3000:]}")
        if job.stdout:
            job.stdout.read()
    timer.cancel()
    assert job.returncode == -signal.SIGKILL


def _manifests(storage: Path) -> dict[str, Any]:
    found = storage.glob("steps/*/manifest.json")
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def _figures(storage: Path) -> tuple[Any, ...]:
    summary = json.loads((storage / "summary.json").read_text(encoding="utf-8"))
    manifests = {name.split("-")[0]: manifest for name, manifest in _manifests(storage).items()}
    losses = [manifests[stage]["outputs"]["final_loss"] for stage in ("pretrain", "finetune")]
    digests = {name: stage["digest"] for name, stage in summary["stages"].items()}
    return summary["grounding"], manifests["evaluate"]["outputs"]["by_kind"], losses, digests


@pytest.mark.parametrize(
    "moments", [pytest.param(FEW, id="few"), pytest.param(MOMENTS, id="all", marks=pytest.mark.thorough)]
)
def test_killed_at_any_moment_it_ends_with_the_same_figures(
    moments: list[tuple[str, float]], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(whole)
    finished: dict[str, Any] = {}
    for line, seconds in moments:
        _killed_at(broken, line, seconds)
        now = _manifests(broken)
        assert finished.items() <= now.items(), "a finished step was run again"
        finished = now
    assert len(finished) >= 5
    _run(broken)
    assert finished.items() <= _manifests(broken).items()
    assert _figures(broken) == _figures(whole)
    assert "there is nothing to do" in _run(broken)
