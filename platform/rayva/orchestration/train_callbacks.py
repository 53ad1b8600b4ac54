"""Between the training workers and the driver: metrics, checkpoints, errors.

Rank 0 hands metrics to an actor, the mailbox; the driver empties it, and leaves word there when workers are
to stop. So only the driver talks to the tracker and to people.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch.distributed as dist

from rayva.errors import RayvaError
from rayva.training.stop import request_stop
from rayva.training.store import CheckpointStore

if TYPE_CHECKING:
    from rayva.training.resume import SavedCheckpoint

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_NOTICES = 2.0

Metrics = dict[str, float]
StepMetrics = tuple[int, Metrics]


@ray.remote(num_cpus=0)
class Mailbox:
    """What the driver wants to know: metrics by step, the stage's length, and an error that ends it."""

    def __init__(self) -> None:
        self._steps: list[StepMetrics] = []
        self._total: int | None = None
        self._error: RayvaError | None = None
        self._stopping = False

    def add(self, steps: Sequence[StepMetrics], total: int) -> None:
        self._steps.extend(steps)
        self._total = total

    def take(self) -> tuple[list[StepMetrics], int | None]:
        steps, self._steps = self._steps, []
        return steps, self._total

    def fail(self, error: RayvaError) -> None:
        self._error = self._error or error

    def error(self) -> RayvaError | None:
        return self._error

    def stop(self) -> None:
        """Asks the workers to save and stop."""
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping


class RayHooks:
    """The training loop's surroundings in a Ray Train worker.

    Ray Train is told neither metrics nor checkpoints. Its reports are barriers, and those that are under way
    when a worker dies are lost. Its list of checkpoints is lost when its file is cut short by a kill, does
    not reach over attempts, and an upload that fails ends the training.
    """

    def __init__(self, store: CheckpointStore, steps_total: int, mailbox: Any) -> None:
        self._store, self._total, self._mailbox = store, steps_total, mailbox
        self._told: Any = None
        self._seconds = 0.0
        self._leaving = False

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """Tells a step. All ranks see the same seconds, so that they ask for notices together."""
        if dist.get_rank() == 0:
            self._told = self._mailbox.add.remote([(step, metrics)], self._total)
        self._seconds += metrics["seconds"]
        if self._seconds >= _SECONDS_BETWEEN_NOTICES:
            self._take_notices()

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Stores this rank's part; rank 0 removes what is not kept any more."""
        self._store.keep(folder, step)

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """What earlier attempts stored."""
        return self._store.checkpoints()

    def leaving(self) -> bool:
        """Whether a node of this training is about to be preempted, as far as is known."""
        return self._leaving

    def close(self) -> None:
        """Waits until the mailbox has all that was told."""
        if self._told is not None:
            ray.get(self._told)

    def _take_notices(self) -> None:
        self._seconds = 0.0
        self._leaving = ray.train.get_preemption_info() is not None  # a barrier
        if ray.get(self._mailbox.stopping.remote()):
            request_stop()
