"""One job at a time on a storage root.

The lock file names its owner (host, process, start of the process) and is refreshed while the owner
lives. A lock is taken over at once if its process is gone from this machine, and after `STALE_SECONDS`
without a refresh if it is another machine's. An owner that could not refresh its lock for so long (it was
suspended, or the storage was out of its reach) finds at its next refresh that the lock is another's, and
stops: two jobs that write one folder would spoil each other's work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
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


class LockLost(KeyboardInterrupt):
    """Stops a job whose lock is another's now; it had better write nothing more to the storage."""


class JobLock:
    """Context manager: holds the storage root for this process.

    A job that loses its lock stops in order, as by Ctrl-C: `LockLost` is raised in its main thread.

    Raises:
        StorageError: on entry, if another living job holds it; names that job. On exit, if the lock was lost.
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
        self._handler: Any = signal.SIG_DFL
        """Of Ctrl-C, before this lock."""
        self._lost: str | None = None
        """What became of the lock, where it is not ours any more."""
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
        self._handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupted)
        self._thread.start()
        return self

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        if self._lost is not None:
            raise LockLost
        if callable(self._handler):
            self._handler(signum, frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with contextlib.suppress(LockLost):  # sent by the thread just before its end
            self._thread.join()
        if signal.getsignal(signal.SIGINT) == self._interrupted:
            signal.signal(signal.SIGINT, self._handler)
        if self._lost is not None:
            raise StorageError(
                f"This job has lost its hold on {self._storage.root} and stopped: {self._lost}.",
                "see that the other job has ended, then run the same command again; finished steps are kept",
            ) from error
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
            with contextlib.suppress(StorageError, OSError), self._exclusive():
                holder = self._read()
                if holder is None or not self._mine(holder):
                    self._lost = _what_became(holder)
                    break
                self._write(self._owner)
        if self._lost is not None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

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


def _what_became(holder: dict[str, Any] | None) -> str:
    """What became of a lock that is not ours any more, in words."""
    if holder is None:
        return f"its lock file {LOCK} is gone; another job took it over and has ended, or somebody removed it"
    return (
        f"process {holder['pid']} on {holder['host']} ({holder['what']}) has taken it over, because this job "
        f"had not refreshed its lock for {STALE_SECONDS:.0f} s"
    )
