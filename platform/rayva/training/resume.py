"""Saving a training and going on from what was saved."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from rayva.errors import TrainingError
from rayva.training.checkpoint import (
    DamagedCheckpointError,
    Progress,
    verify,
    write_manifest,
    write_progress,
)
from rayva.training.engine import Engine

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class SavedCheckpoint(Protocol):
    """A checkpoint that an earlier attempt left, wherever it is stored."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        ...

    def open(self) -> AbstractContextManager[Path]:
        """The merged checkpoint as a local folder."""
        ...


class Hooks(Protocol):
    """What surrounds the loop."""

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """After each optimizer step, on every rank; `step` steps are done and the numbers are global."""
        ...

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Stores what this rank wrote into `folder`, which is gone afterwards. Called on every rank."""
        ...

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """Checkpoints to go on from, newest first; the same on every rank."""
        ...


def save(engine: Engine, hooks: Hooks, progress: Progress, metrics: Metrics) -> None:
    with tempfile.TemporaryDirectory(prefix="rayva-checkpoint-") as temporary:
        folder = Path(temporary)
        engine.save(folder)
        if engine.rank == 0:
            write_progress(folder, progress)
        write_manifest(folder, engine.rank)
        hooks.on_checkpoint(folder, progress.step, metrics)


def restore(engine: Engine, hooks: Hooks, fresh: Progress) -> Progress:
    """Loads the newest sound checkpoint and returns its position, or `fresh` where there is none.

    Every rank verifies the copy that it is going to load; one that any rank rejects is passed over.
    """
    for checkpoint in hooks.checkpoints():
        with checkpoint.open() as folder:
            progress, problem = None, ""
            try:
                progress = verify(folder)
            except DamagedCheckpointError as error:
                problem = str(error)
            rejected = engine.reduce_sum([float(progress is None)])[0] > 0
            if progress is None or rejected:
                logger.warning(
                    "checkpoint %s is passed over, the one before is taken: %s",
                    checkpoint.name,
                    problem or "another worker's copy is damaged",
                )
                continue
            _require_compatible(checkpoint.name, progress, fresh)
            engine.load(folder)
            logger.info("going on from checkpoint %s, step %d", checkpoint.name, progress.step)
            return progress
    return fresh


def _require_compatible(name: str, found: Progress, now: Progress) -> None:
    if found.job_digest != now.job_digest:
        raise TrainingError(
            f"The checkpoint {name} belongs to a training with other settings or data",
            "Give this run a storage folder of its own.",
        )
    if found.dtype != now.dtype:
        raise TrainingError(
            f"The checkpoint {name} was trained in {found.dtype}, this machine would go on in {now.dtype}",
            "Set the stage's precision to that of the checkpoint.",
        )
    if found.world_size != now.world_size and now.zero > 0:
        raise TrainingError(
            f"The checkpoint {name} was saved by {found.world_size} workers with ZeRO {found.zero}; "
            f"there are {now.world_size} now",
            f"Run with scaling.workers={found.world_size}.",
        )
