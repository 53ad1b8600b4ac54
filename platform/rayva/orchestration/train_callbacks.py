"""Between the training workers and the driver: metrics, checkpoints, errors.

Workers report to Ray Train's controller, whose callback hands metrics to an actor, the mailbox; the
driver empties it. So only the driver talks to the tracker and to people.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import Checkpoint, UserCallback

from rayva.errors import RayvaError
from rayva.storage import Storage
from rayva.training.checkpoint import PROGRESS

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


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint that Ray Train stored in an attempt of this stage."""

    storage: Storage
    rel: str

    @property
    def name(self) -> str:
        return self.rel

    @contextmanager
    def open(self) -> Iterator[Path]:
        yield self.storage.localize(self.rel)

    def step(self) -> int | None:
        """Steps done; None where the checkpoint was not finished."""
        path = f"{self.rel}/{PROGRESS}"
        return int(self.storage.read_json(path)["step"]) if self.storage.exists(path) else None


def stored_checkpoints(storage: Storage, rel: str) -> list[StoredCheckpoint]:
    """Checkpoints of all attempts under `rel`, newest first; those without a position are left out.

    Ray Train's own list is not used: it is lost when its file is cut short by a kill, and it does not
    reach over attempts. What a checkpoint is worth is decided by its manifests.
    """
    found = []
    for attempt in storage.list(rel):
        for name in storage.list(f"{rel}/{attempt}"):
            if name.startswith("checkpoint_"):
                checkpoint = StoredCheckpoint(storage, f"{rel}/{attempt}/{name}")
                step = checkpoint.step()
                if step is not None:
                    found.append((step, checkpoint.rel, checkpoint))
    return [checkpoint for _, _, checkpoint in sorted(found, key=lambda item: item[:2], reverse=True)]


class RayHooks:
    """The training loop's surroundings in a Ray Train worker."""

    def __init__(self, storage: Storage, rel: str, steps_total: int) -> None:
        self._storage, self._rel, self._total = storage, rel, steps_total
        self._pending: list[StepMetrics] = []
        self._seconds = 0.0

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """Reports groups of steps. All ranks see the same seconds, so that they report together."""
        self._pending.append((step, metrics))
        self._seconds += metrics["seconds"]
        if self._seconds >= _SECONDS_BETWEEN_REPORTS:
            self.flush(None)

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Reports this rank's part; Ray Train merges the parts of all ranks into one folder."""
        self.flush(Checkpoint.from_directory(str(folder)))

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """What earlier attempts stored."""
        return stored_checkpoints(self._storage, self._rel)

    def flush(self, checkpoint: Checkpoint | None) -> None:
        """Reports what has gathered."""
        ray.train.report({"steps": self._pending, "steps_total": self._total}, checkpoint=checkpoint)
        self._pending, self._seconds = [], 0.0
