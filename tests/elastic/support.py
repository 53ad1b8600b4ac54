"""Distributed runs without Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 500


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def start_ranks(world_size: int, cases: list[dict[str, Any]], root: Path) -> list[subprocess.Popen[bytes]]:
    """Starts `world_size` processes that run `cases` one after another, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.elastic.rank", json.dumps(cases), str(root)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, cases: list[dict[str, Any]], root: Path) -> None:
    ranks = start_ranks(world_size, cases, root)
    assert [rank.wait(timeout=PATIENCE_SECONDS) for rank in ranks] == [0] * world_size


def losses(root: Path, name: str) -> list[list[float]]:
    """Losses of every run of a case, in the order of the runs."""
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
