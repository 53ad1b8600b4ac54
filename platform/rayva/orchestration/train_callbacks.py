"""Between the training workers and the driver: metrics, checkpoints, errors.

Workers report to Ray Train's controller, whose callback hands metrics to an actor, the mailbox; the
driver empties it. So only the driver talks to the tracker and to people.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, UserCallback

from rayva.errors import RayvaError
from rayva.training.store import CheckpointStore

if TYPE_CHECKING:
    from rayva.training.resume import SavedCheckpoint

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 2.0
"""Ray Train's queue holds one report, and a report is a barrier: steps are reported in groups."""

Metrics = dict[str, float]
StepMetrics = tuple[int, Metrics]


@ray.remote(num_cpus=0)
class Mailbox:
    """What the driver wants to know: metrics by step, the stage's length, and an error that ends it."""

    def __init__(self) -> None:
        self._steps: list[StepMetrics] = []
        self._total: int | None = None
        self._error: RayvaError | None = None

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


class MetricsCallback(UserCallback):  # type: ignore[misc]  # ray has no types
    """Runs in the controller: hands rank 0's metrics, which are global, to the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        self._mailbox.add.remote(metrics[0]["steps"], metrics[0]["steps_total"])


class RayHooks:
    """The training loop's surroundings in a Ray Train worker.

    Ray Train stores no checkpoint: its list of them is lost when its file is cut short by a kill, does not
    reach over attempts, and an upload that fails ends the training. It is told the metrics alone.
    """

    def __init__(self, store: CheckpointStore, steps_total: int) -> None:
        self._store, self._total = store, steps_total
        self._pending: list[StepMetrics] = []
        self._seconds = 0.0
        self._leaving = False

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """Reports groups of steps. All ranks see the same seconds, so that they report together."""
        self._pending.append((step, metrics))
        self._seconds += metrics["seconds"]
        if self._seconds >= _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Stores this rank's part; rank 0 removes what is not kept any more."""
        self._store.put(folder, step)
        if dist.get_rank() == 0:
            self._store.prune()

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """What earlier attempts stored."""
        return self._store.checkpoints()

    def leaving(self) -> bool:
        """Whether a node of this training is about to be preempted, as of the last report."""
        return self._leaving

    def flush(self) -> None:
        """Reports what has gathered, and takes the notices that Ray Train has for all ranks."""
        ray.train.report({"steps": self._pending, "steps_total": self._total})
        self._pending, self._seconds = [], 0.0
        self._leaving = ray.train.get_preemption_info() is not None
