"""Step folders: each finished piece of work lies in a folder addressed by what it was made from.

A step's digest covers the settings it reads, the digests of its inputs and the format version. A
folder whose manifest exists is finished and is never written again; one without was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rayva.errors import StorageError
from rayva.storage import Storage

FORMAT = 1
"""Raised when finished folders of older code must not be used any more."""

MANIFEST = "manifest.json"
ATTEMPTS = "attempts.json"


RECIPE = "recipe.json"
"""At the storage root: the recipe that a job was last started with."""
SUMMARY = "summary.json"
"""At the storage root: what a job has made."""


def read_summary(storage: Storage) -> dict[str, Any]:
    """The summary of the run in `storage`, which has one.

    Raises:
        StorageError: the file is damaged, or another program's.
    """
    found = storage.read_json(SUMMARY)
    if not isinstance(found, dict) or not isinstance(found.get("stages"), dict):
        raise StorageError(
            f"{storage.uri(SUMMARY)} is not the summary of a run.", "give the --storage of pipelines/full.py"
        )
    return found


def command_to_go_on(storage: Storage, *arguments: str) -> str:
    """A line for a shell that goes on with the run in `storage`, under the settings that it had last."""
    line = ["python", "pipelines/full.py", "--config", storage.uri(RECIPE), "--storage", storage.root]
    return shlex.join([*line, *arguments])


def step_digest(name: str, slice: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 (hex) of everything that decides a step's result.

    Args:
        slice: the settings that the step reads, as JSON data.
        inputs: digest of each step whose output it reads, by name.
    """
    what = {"format": FORMAT, "step": name, "slice": slice, "inputs": inputs}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StepFolder:
    """The folder of one step at one digest."""

    storage: Storage
    name: str
    digest: str

    @property
    def rel(self) -> str:
        """Path relative to the storage root."""
        return f"steps/{self.name}-{self.digest[:12]}"

    def join(self, *parts: str) -> str:
        """Path of a file in this folder, relative to the storage root."""
        return "/".join((self.rel, *parts))

    def manifest(self) -> dict[str, Any] | None:
        """What the finished step recorded; None while it is unfinished."""
        path = self.join(MANIFEST)
        if not self.storage.exists(path):
            return None
        manifest: dict[str, Any] = self.storage.read_json(path)
        if manifest.get("digest") != self.digest:
            raise StorageError(
                f"{self.storage.uri(path)} belongs to another run (its digest is not this step's).",
                f"delete the folder, or run again with --force {self.name}",
            )
        return manifest

    @property
    def outputs(self) -> dict[str, Any]:
        """The finished step's outputs; `StorageError` while it is unfinished."""
        manifest = self.manifest()
        if manifest is None:
            raise StorageError(f"Step {self.name} is not finished.", f"run pipelines/{self.name}.py first")
        outputs: dict[str, Any] = manifest["outputs"]
        return outputs

    def attempts(self) -> list[float]:
        """Seconds of each attempt so far; the last may have been cut short by a kill."""
        path = self.join(ATTEMPTS)
        return [float(s) for s in self.storage.read_json(path)] if self.storage.exists(path) else []

    def finish(
        self,
        outputs: Mapping[str, Any],
        metrics: Mapping[str, float],
        seconds: float,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the manifest, last and atomically: from here on the step is finished.

        Args:
            seconds: over all attempts.
            about: anything else worth keeping (settings, inputs, code version).
        """
        manifest = {
            **(about or {}),
            "format": FORMAT,
            "step": self.name,
            "digest": self.digest,
            "outputs": dict(outputs),
            "metrics": dict(metrics),
            "seconds": round(seconds, 2),
            "finished": time.time(),
        }
        self.storage.write_json(self.join(MANIFEST), manifest)

    def forget(self) -> None:
        """Removes the folder; the manifest goes first, so that a half-removed folder is unfinished."""
        self.storage.delete(self.join(MANIFEST))
        self.storage.delete(self.rel)


class AttemptClock:
    """Times an attempt and keeps the count on the storage, so that a killed attempt is counted too.

    At most `every` seconds of a killed attempt are lost.
    """

    def __init__(self, folder: StepFolder, every: float | None = None) -> None:
        self._folder = folder
        self._every = every if every is not None else (10.0 if folder.storage.is_local else 60.0)
        self._before = folder.attempts()
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="attempt-clock", daemon=True)

    @property
    def seconds(self) -> float:
        """Seconds over all attempts, this one included."""
        return sum(self._before) + time.monotonic() - self._started

    def _write(self) -> None:
        seconds = [*self._before, round(time.monotonic() - self._started, 2)]
        self._folder.storage.write_json(self._folder.join(ATTEMPTS), seconds)

    def _keep(self) -> None:
        while not self._stop.wait(self._every):
            # The step's own next write reports it, where it can be handled; a later one may succeed.
            with contextlib.suppress(StorageError, OSError):
                self._write()

    def __enter__(self) -> AttemptClock:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        # A full disk must not hide the error that is already under way.
        if error is None or not isinstance(error, (OSError, StorageError)):
            self._write()
