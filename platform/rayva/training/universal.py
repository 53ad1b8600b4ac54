"""ZeRO states for another number of workers, by way of DeepSpeed's universal checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from rayva.errors import TrainingError

_TAIL = 2000


@contextmanager
def converted(folder: Path, tag: str) -> Iterator[Path]:
    """A folder that holds `folder`/`tag` as a universal checkpoint of the same tag; gone afterwards.

    One rank of each node converts, on the node's own disk; every rank has to call it. DeepSpeed
    unpickles while it converts: `folder` must have been verified before.
    """
    leader = int(os.environ.get("LOCAL_RANK", "0")) == 0
    target = Path(tempfile.mkdtemp(prefix="rayva-universal-")) if leader else None
    try:
        failure = _convert(folder / tag, target / tag) if target else ""
        told: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (_node(), str(target) if target else "", failure))
        answers = [answer for answer in told if answer is not None]
        failures = [failure for _, _, failure in answers if failure]
        if failures:
            raise TrainingError(
                f"The checkpoint {folder} could not be converted to {dist.get_world_size()} workers: "
                f"{failures[0]}",
                "Give TMPDIR a place with room for three times the checkpoint, or run with the number of "
                "workers that saved it.",
            )
        yield Path(next(path for node, path, _ in answers if path and node == _node()))
        dist.barrier()  # the others may still be reading
    finally:
        if target:
            shutil.rmtree(target, ignore_errors=True)


def _node() -> str:
    """Ray Train and torchrun number the nodes; each has a name of its own for that."""
    return os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"


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
