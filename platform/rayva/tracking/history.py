"""The figures of each optimizer step as a file in the step's folder: they outlive the tracking server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping

from rayva.storage import Storage

HISTORY = "metrics.jsonl"
"""In a step's folder: one JSON object an optimizer step, with "step" and the figures."""

_LOCAL_SECONDS = 2.0
_REMOTE_SECONDS = 60.0
_MOST_OF_THE_TIME = 0.05
"""Share of the time that writing may take; long histories are written less often."""


class History:
    """Rows by step. A step that is done again after a failure replaces its row."""

    def __init__(self, storage: Storage, rel: str) -> None:
        self._storage, self._rel = storage, rel
        self._rows = {int(row["step"]): row for row in read_history(storage, rel)}
        self._pause = _LOCAL_SECONDS if storage.is_local else _REMOTE_SECONDS
        self._due = time.monotonic() + self._pause
        self._changed = False

    def add(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Takes rows; figures of step 0 belong to the whole and are no history."""
        for step, values in rows:
            if step > 0:
                self._rows[step] = {"step": step, **{key: float(value) for key, value in values.items()}}
                self._changed = True
        if self._changed and time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Writes all rows, in order of their steps, if there are new ones."""
        if self._changed:
            started = time.monotonic()
            lines = (json.dumps(self._rows[step]) + "\n" for step in sorted(self._rows))
            self._storage.write_bytes(self._rel, "".join(lines).encode())
            now = time.monotonic()
            self._due = now + max(self._pause, (now - started) / _MOST_OF_THE_TIME)
            self._changed = False


def read_history(storage: Storage, rel: str) -> list[dict[str, float]]:
    """The rows of the file `rel` in order; empty where there is none."""
    if not storage.exists(rel):
        return []
    return [json.loads(line) for line in storage.read_bytes(rel).decode().splitlines()]
