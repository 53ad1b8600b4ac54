"""ZeRO states for another number of workers, by way of DeepSpeed's universal checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from rayva.errors import TrainingError
from rayva.training.nodes import node_folder

_TAIL = 2000


@contextmanager
def converted(folder: Path, tag: str) -> Iterator[Path]:
    """A folder that holds `folder`/`tag` as a universal checkpoint of the same tag; gone afterwards.

    One rank of each node converts, on the node's own disk; every rank has to call it. DeepSpeed
    unpickles while it converts: `folder` must have been verified before.
    """

    def failed(reason: str) -> TrainingError:
        return TrainingError(
            f"The checkpoint {folder} could not be converted to {dist.get_world_size()} workers: {reason}",
            "Give TMPDIR a place with room for three times the checkpoint, or run with the number of "
            "workers that saved it.",
        )

    with node_folder(lambda: _conversion(folder, tag), failed) as target:
        yield target


@contextmanager
def _conversion(folder: Path, tag: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rayva-universal-", ignore_cleanup_errors=True) as name:
        if failure := _convert(folder / tag, Path(name) / tag):
            raise TrainingError(failure, "")
        yield Path(name)


def _convert(source: Path, target: Path) -> str:
    """Converts in a process of its own, which may fork and whose memory is given back; says what failed."""
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(source), "--output_folder", str(target),
        "--num_extract_workers", workers, "--num_merge_workers", workers,
        "--inject_missing_state",  # ZeRO 1 and 2 write none of what only tensor parallelism needs
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"status {done.returncode}: {done.stderr[-_TAIL:]}"
    return "" if (target / "zero" / "optimizer_state.pt").is_file() else "it left no optimizer state"
