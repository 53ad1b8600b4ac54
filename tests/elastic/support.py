"""Distributed runs, and what they train on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from rayva.recipes.schema import Recipe
from rayva.steps import StepFolder
from rayva.storage import Storage
from tests.training.stage_support import finished_inputs, pretrained, step_folder, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 500
SAMPLES = 160


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def stage_recipe(case: dict[str, Any]) -> Recipe:
    """The recipe of a case of `tests.elastic.ray_driver`."""
    settings = {"checkpoint_every": 5, "keep_checkpoints": 99} | case["settings"]
    recipe = tiny_recipe(2, epochs=case["steps"] * 8 / SAMPLES, **settings)
    workers = case["workers"]
    changes = {"workers": tuple(workers) if isinstance(workers, list) else workers}
    scaling = recipe.scaling.model_copy(update=changes | {"resize_seconds": 2.0, "max_failures": 9})
    return recipe.model_copy(update={"scaling": scaling})


def stage_inputs(storage: Storage, stage: str) -> dict[str, StepFolder]:
    """The finished steps that a stage needs, made where they are missing."""
    needs = ["weights", "data", "features", *(["pretrain"] if stage == "finetune" else [])]
    folders = {name: step_folder(storage, name) for name in needs}
    if any(folder.manifest() is None for folder in folders.values()):
        finished_inputs(storage, SAMPLES)
        pretrained(storage)
    return folders


def start_ranks(
    world_size: int, arguments: list[str], module: str = "tests.elastic.rank"
) -> list[subprocess.Popen[bytes]]:
    """Starts `world_size` processes of `module`, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    return [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(
    world_size: int, cases: list[dict[str, Any]], root: Path, module: str = "tests.elastic.rank"
) -> None:
    """Runs `cases` one after another."""
    ranks = start_ranks(world_size, [str(root), json.dumps(cases)], module)
    assert [rank.wait(timeout=PATIENCE_SECONDS) for rank in ranks] == [0] * world_size


def losses(root: Path, name: str) -> list[list[float]]:
    """Losses of every run of a case, in the order of the runs."""
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
