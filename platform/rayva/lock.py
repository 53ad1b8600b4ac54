"""One job at a time on a storage root.

The lock file names its owner (host, process, start of the process) and is refreshed while the owner
lives. A lock is taken over at once if its process is gone from this machine, and after `STALE_SECONDS`
without a refresh if it is another machine's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rayva.errors import StorageError
from rayva.progress import duration
from rayva.storage import Storage

LOCK = "job.lock"
REFRESH_SECONDS = 15.0
STALE_SECONDS = 90.0


def _process_start(pid: int) -> str | None:
    """When the process began, in clock ticks since boot; None where there is no such process.

    Tells a process from a later one that was given the same number.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in brackets, may itself hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]


class JobLock:
    """Context manager: holds the storage root for this process.

    Raises:
        StorageError: on entry, if another living job holds it; names that job.
    """

    def __init__(self, storage: Storage, what: str = "job") -> None:
        self._storage = storage
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.time(),
            "what": what,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="job-lock", daemon=True)

    def __enter__(self) -> JobLock:
        with self._exclusive():
            holder = self._read()
            if holder is not None and self._alive(holder):
                raise StorageError(
                    f"Another job has been writing {self._storage.root} for "
                    f"{duration(time.time() - holder['since'])}: process {holder['pid']} on {holder['host']} "
                    f"({holder['what']}).",
                    "wait until it ends or stop it, or choose another place with --storage",
                )
            self._write(self._owner)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._exclusive():
            holder = self._read()
            if holder is not None and self._mine(holder):
                self._storage.delete(LOCK)

    def _mine(self, holder: dict[str, Any]) -> bool:
        return all(holder.get(key) == self._owner[key] for key in ("host", "pid", "process_start"))

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder["host"] == self._owner["host"]:
            start = _process_start(holder["pid"])
            return start is not None and bool(start == holder["process_start"])
        return bool(time.time() - holder["refreshed"] < STALE_SECONDS)

    def _read(self) -> dict[str, Any] | None:
        if not self._storage.exists(LOCK):
            return None
        try:
            holder: dict[str, Any] = json.loads(self._storage.read_bytes(LOCK))
        except ValueError:
            return None  # locks are written atomically: this is not one of ours
        return holder

    def _write(self, holder: dict[str, Any]) -> None:
        self._storage.write_json(LOCK, {**holder, "refreshed": time.time()})

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            # The job's own next write reports it, where it can be handled; a later refresh may succeed.
            with contextlib.suppress(StorageError, OSError):
                self._write(self._owner)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keeps two starting jobs on one file system from both finding the lock free.

        The kernel lets go of this one when the process dies. Object stores have no such thing; there the
        window is the time of one read and one write.
        """
        if not self._storage.is_local:
            yield
            return
        self._storage.makedirs()
        descriptor = os.open(self._storage.path(), os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
