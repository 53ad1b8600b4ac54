"""Saving a training and going on from what was saved."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from rayva.errors import StorageError, TrainingError
from rayva.recipes.schema import Stage
from rayva.training.checkpoint import (
    DamagedCheckpointError,
    Progress,
    verify,
    write_manifest,
    write_progress,
)
from rayva.training.engine import Engine
from rayva.training.nodes import node_folder
from rayva.training.stop import TrainingStopped, stop_requested

logger = logging.getLogger(__name__)

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
Metrics = dict[str, float]
FAILED = "failed_checkpoints"
"""Count, and metric, of checkpoints that could not be saved."""


class SavedCheckpoint(Protocol):
    """A checkpoint that an earlier attempt left, wherever it is stored."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        ...

    def progress(self) -> Progress | None:
        """Where it stands; None where it is not finished."""
        ...

    def open(self) -> AbstractContextManager[Path]:
        """The merged checkpoint as a local folder; may fail with `DamagedCheckpointError`.

        One rank of each node opens it, for all of that node.
        """
        ...


class Hooks(Protocol):
    """What surrounds the loop."""

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """After each optimizer step, on every rank; `step` steps are done and the numbers are global."""
        ...

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Stores what this rank wrote into `folder`, which is gone afterwards, the manifest last.

        Called on every rank, in a thread of its own. It may fail with `OSError` or `StorageError`, but must
        not leave a manifest then.
        """
        ...

    def leaving(self) -> bool:
        """Whether this worker is about to be taken away: a checkpoint is saved at once."""
        ...

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """Checkpoints to go on from, newest first, as far as this rank sees them."""
        ...


class Saver:
    """Decides when a checkpoint is due, and saves it without holding up training or bringing it down.

    All ranks agree on every decision: what only one of them knows (rank 0's clock, a notice that a node
    goes, a signal, a failed upload) is shared in one small all-reduce a step.
    """

    def __init__(self, engine: Engine, hooks: Hooks, stage: Stage, steps_total: int) -> None:
        self._engine, self._hooks, self._stage, self._total = engine, hooks, stage, steps_total
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[str] | None = None
        self._failed: list[str] = []
        self._losses: list[float] = []
        self._since = time.monotonic()
        self._left = False

    def after_step(self, progress: Progress, metrics: Metrics) -> Progress:
        """Saves where that is due; returns `progress` with its count of failed checkpoints kept.

        Raises `TrainingStopped` after the checkpoint that a signal asked for.
        """
        self._losses.append(metrics["loss"])
        minutes, leaving, stopping, failed = self._agree()
        if failed:
            progress.counts[FAILED] = progress.counts.get(FAILED, 0) + 1
        at_once = stopping or (leaving and not self._left)
        self._left = leaving
        due = progress.step % self._stage.checkpoint_every == 0 or minutes or at_once
        if due and progress.step < self._total:
            self._save(replace(progress, loss=sum(self._losses) / len(self._losses)), metrics)
            if at_once:
                self.finish()
        if stopping and progress.step < self._total:
            raise TrainingStopped(progress.step, saved=not self.settle())
        return progress

    def finish(self) -> None:
        """Waits for the upload that is under way."""
        if self._upload is not None:
            problem, self._upload = self._upload.result(), None
            if problem:
                self._failed.append(problem)

    def settle(self) -> int:
        """Waits for the last upload, on all ranks; returns 1 if it failed, else 0."""
        self.finish()
        return int(self._engine.reduce_sum([float(bool(self._failed))])[0] > 0)

    def close(self) -> None:
        """Waits for the last upload of this rank."""
        self.finish()
        self._pool.shutdown()

    def _agree(self) -> tuple[bool, bool, bool, bool]:
        if self._upload is not None and self._upload.done():
            self.finish()
        limit = self._stage.checkpoint_minutes
        late = limit is not None and time.monotonic() - self._since >= 60 * limit
        own = [late and self._engine.rank == 0, self._hooks.leaving(), stop_requested(), bool(self._failed)]
        self._failed.clear()
        minutes, leaving, stopping, failed = self._engine.reduce_sum([float(flag) for flag in own])
        return minutes > 0, leaving > 0, stopping > 0, failed > 0

    def _save(self, progress: Progress, metrics: Metrics) -> None:
        self.finish()  # one at a time: uploads that are slower than training hold it up, not fill the disk
        self._since = time.monotonic()
        temporary, problem = _temporary_folder()
        # The ranks meet while they write: none may be missing.
        if self._any(problem is not None) or temporary is None:
            self._give_up(temporary, progress.step, problem)
            return
        folder = Path(temporary.name)
        problem = self._engine.save(folder)
        if self._engine.rank == 0 and problem is None:
            try:
                write_progress(folder, progress)
            except OSError as error:
                problem = error
        if self._any(problem is not None):
            self._give_up(temporary, progress.step, problem)
            return
        self._losses.clear()
        self._upload = self._pool.submit(self._store, temporary, progress.step, dict(metrics))

    def _any(self, here: bool) -> bool:
        """Whether something is so on any rank."""
        return self._engine.reduce_sum([float(here)])[0] > 0

    def _give_up(
        self, temporary: tempfile.TemporaryDirectory[str] | None, step: int, problem: OSError | None
    ) -> None:
        if problem is not None:
            self._failed.append(_tell_failure(step, problem))
        if temporary is not None:
            temporary.cleanup()

    def _store(self, temporary: tempfile.TemporaryDirectory[str], step: int, metrics: Metrics) -> str:
        """Runs in the thread; returns what went wrong."""
        with temporary as name:
            try:
                write_manifest(Path(name), self._engine.rank)
                self._hooks.on_checkpoint(Path(name), step, metrics)
            except Exception as error:  # noqa: BLE001  # of any client; one rank alone must not leave the others
                return _tell_failure(step, error)
        return ""


def _temporary_folder() -> tuple[tempfile.TemporaryDirectory[str] | None, OSError | None]:
    """A place for a checkpoint, or what keeps it from being made."""
    try:
        made = tempfile.TemporaryDirectory(prefix="rayva-checkpoint-", ignore_cleanup_errors=True)
    except OSError as error:
        return None, error
    return made, None


def _tell_failure(step: int, error: Exception) -> str:
    text = str(error).replace("\n", " ")
    logger.warning("the checkpoint after step %d could not be saved, training goes on: %s", step, text)
    return text


def saved_dtype(hooks: Hooks, job_digest: str) -> torch.dtype | None:
    """What the newest finished checkpoint of this training was trained in, as rank 0 sees it."""
    told: list[str | None] = [None]
    if dist.get_rank() == 0:
        found = (checkpoint.progress() for checkpoint in hooks.checkpoints())
        told = [next((p.dtype for p in found if p is not None and p.job_digest == job_digest), None)]
    dist.broadcast_object_list(told, src=0)
    return _DTYPES.get(told[0] or "")


def restore(engine: Engine, hooks: Hooks, fresh: Progress) -> Progress:
    """Loads the newest sound checkpoint and returns its position, or `fresh` where there is none."""
    damaged = 0
    for name, checkpoint in _agreed_checkpoints(hooks):
        try:
            progress = _load(engine, name, checkpoint, fresh)
        except DamagedCheckpointError as error:
            damaged += 1
            logger.warning("checkpoint %s is passed over: %s", name, error)
        else:
            logger.info("going on from checkpoint %s, step %d", name, progress.step)
            return progress
    if damaged:
        logger.warning("none of the %d checkpoints is sound: the stage begins anew", damaged)
    return fresh


def _load(engine: Engine, name: str, checkpoint: SavedCheckpoint | None, fresh: Progress) -> Progress:
    """Loads a checkpoint that every rank has verified where it reads it.

    Raises `DamagedCheckpointError` on all ranks where any of them rejects it.
    """
    unseen = engine.reduce_sum([float(checkpoint is None)])[0] > 0
    if checkpoint is None or unseen:
        raise DamagedCheckpointError(f"{'another' if checkpoint else 'this'} worker does not see it")
    with node_folder(checkpoint.open, partial(_not_fetched, name)) as folder:
        progress, problem = None, "another worker's copy is damaged"
        try:
            progress = verify(folder)
        except DamagedCheckpointError as error:
            problem = str(error)
        rejected = engine.reduce_sum([float(progress is None)])[0] > 0
        if progress is None or rejected:
            raise DamagedCheckpointError(problem)
        _require_compatible(name, progress, fresh)
        engine.load(folder, progress.world_size)
        return progress


def _not_fetched(name: str, reason: str) -> StorageError:
    return StorageError(
        f"The checkpoint {name} could not be fetched: {reason}",
        "See that the storage can be reached and that TMPDIR has room for the checkpoint.",
    )


def _agreed_checkpoints(hooks: Hooks) -> list[tuple[str, SavedCheckpoint | None]]:
    """Names that rank 0 sees, with what this rank sees under each: a shared disk may show them late."""
    own = {checkpoint.name: checkpoint for checkpoint in hooks.checkpoints()}
    names = [list(own)]
    dist.broadcast_object_list(names, src=0)
    return [(name, own.get(name)) for name in names[0]]


def _require_compatible(name: str, found: Progress, now: Progress) -> None:
    if found.job_digest != now.job_digest:
        raise TrainingError(
            f"The checkpoint {name} belongs to a training with other settings or data",
            "Give this run a storage folder of its own.",
        )
    if found.dtype != now.dtype:
        raise TrainingError(
            f"The checkpoint {name} was trained in {found.dtype}, this machine would go on in {now.dtype}",
            "Go on with machines that compute in that precision. With another setting of `precision` the "
            "stage begins anew, in a folder of its own.",
        )
