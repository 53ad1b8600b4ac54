"""A tracker that keeps nothing, for tests and for steps that are run by hand."""

from __future__ import annotations

from rayva.recipes import Recipe
from rayva.storage import Storage
from rayva.tracking.mlflow_tracker import JobTracker, Run
from rayva.tracking.outbox import Operation


class _Nowhere:
    """Takes operations and drops them."""

    away = "nothing is tracked"
    fault = None

    def add(self, *operations: Operation) -> None:
        """Drops them."""

    def persist(self) -> None:
        """There is nothing to keep."""

    def wait(self, timeout: float) -> bool:
        return False

    def close(self, timeout: float) -> None:
        """There is nothing to send."""


class NoopTracker(JobTracker):
    """A `JobTracker` without a server, a spool or a state file. It has no run ids and no registry."""

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        self._storage, self._recipe, self._uri = storage, recipe, ""
        self.uri, self.experiment = "", recipe.tracking.experiment
        self._outbox = _Nowhere()
        self._run = self.job = Run("job", self._outbox)
