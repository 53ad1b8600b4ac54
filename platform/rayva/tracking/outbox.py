"""The outbox: what is to be tracked goes to the storage first, and from there to the server.

Operations are kept in small files, `tracking-spool/<server>-<number>.jsonl`, one JSON object a line.
A thread sends the files in their order and removes each when the server has taken it. So nothing is
lost when the server is away or the job is killed: the next job at this storage sends what is left.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any, Protocol

from rayva.progress import say
from rayva.storage import Storage

log = logging.getLogger(__name__)

SPOOL = "tracking-spool"
Operation = dict[str, Any]
"""`op` names the operation, `run` the key of the run it is for; the rest are its arguments."""

_GATHER_SECONDS = 1.0
_RETRY_SECONDS = 5.0
_MAX_RETRY_SECONDS = 60.0


class ServerAway(Exception):
    """The tracking server cannot be reached now, or refuses everybody; what was to be sent is kept."""


class Rejected(Exception):
    """The server understood the operation and will never accept it."""


class Server(Protocol):
    """What takes the operations (`rayva.tracking.server`; slow to import, so the thread makes it)."""

    def connect(self) -> None: ...

    def apply(self, operation: Operation) -> None: ...


def kept_for(storage: Storage, address: str) -> list[str]:
    """Names of the files that wait for the server `address`, in their order."""
    return [name for name in storage.list(SPOOL) if name.startswith(f"{address}-")]


class Outbox:
    """A durable queue of operations and the thread that sends them.

    Args:
        server: used by the thread alone, except after `close`.
        address: identifies the server in file names.
        shown: the server's URI, without secrets, for messages.
    """

    def __init__(self, storage: Storage, server: Server, address: str, shown: str) -> None:
        self._storage, self._server, self._shown = storage, server, shown
        self._prefix = f"{address}-"
        self._changed = threading.Condition()
        self._gathered: list[Operation] = []
        self._files = kept_for(storage, address)
        self._next = int(self._files[-1][len(self._prefix) : -len(".jsonl")]) + 1 if self._files else 0
        self._fault: Exception | None = None
        self._away: str | None = None
        self._told = False
        self._closing = False
        self._connected = False
        self._urgent = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> Exception | None:
        """What ended the thread; every call raises it."""
        return self._fault

    @property
    def away(self) -> str | None:
        """Why the server cannot be reached; None while it can, or has not been tried yet."""
        return self._away

    def add(self, *operations: Operation) -> None:
        """Queues operations; written and sent within a second or so."""
        with self._changed:
            self._raise_fault()
            self._gathered += operations

    def persist(self) -> None:
        """Returns when everything queued so far is on the storage."""
        with self._changed:
            self._raise_fault()
            self._write_gathered()

    def wait(self, timeout: float) -> bool:
        """Waits until everything is sent. False: the server is away, or `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._urgent = True
            self._away = None  # one more try, now
            self._changed.notify_all()
            while True:
                self._raise_fault()
                if self._connected and not self._gathered and not self._files:
                    return True
                left = deadline - time.monotonic()
                if self._away is not None or left <= 0:
                    return False
                self._changed.wait(left)

    def close(self, timeout: float) -> None:
        """Sends what can be sent within `timeout` seconds and ends the thread; the rest stays spooled."""
        self.persist()
        self.wait(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if left := self.pending():
            say(
                f"Tracking: {self._shown} could not take everything; {left} files wait in "
                f"{self._storage.uri(SPOOL)}. The next job at this storage sends them."
            )

    def pending(self) -> int:
        """Files that wait on the storage for this server."""
        with self._changed:
            return len(self._files)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _write_gathered(self) -> None:
        """Moves what is gathered into a file; the lock is held."""
        if self._gathered:
            name = f"{self._prefix}{self._next:08d}.jsonl"
            lines = "".join(json.dumps(operation) + "\n" for operation in self._gathered)
            self._storage.write_bytes(f"{SPOOL}/{name}", lines.encode())
            self._gathered = []
            self._files.append(name)
            self._next += 1

    def _work(self) -> None:
        delay = _RETRY_SECONDS
        try:
            while True:
                try:
                    self._send_all()
                    delay = _RETRY_SECONDS
                except ServerAway as error:
                    self._tell_away(str(error))
                    delay = min(2 * delay, _MAX_RETRY_SECONDS)
                if not self._rest(delay if self._away else _GATHER_SECONDS):
                    return
        except Exception as error:  # noqa: BLE001 (the caller's thread raises it at its next call)
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    def _rest(self, seconds: float) -> bool:
        """Waits for the next round, writing down what comes meanwhile. False: there is to be none."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and not self._urgent and time.monotonic() < until:
                self._changed.wait(_GATHER_SECONDS)
                self._write_gathered()
            self._urgent = False
            return not self._closing

    def _send_all(self) -> None:
        if not self._connected:
            self._server.connect()
        with self._changed:
            self._connected = True
            self._write_gathered()
        while True:
            with self._changed:
                if not self._files:
                    self._tell_back()
                    self._changed.notify_all()
                    return
                name = self._files[0]
            self._send(name)
            with self._changed:
                self._files.pop(0)

    def _send(self, name: str) -> None:
        rel = f"{SPOOL}/{name}"
        for line in self._storage.read_bytes(rel).decode().splitlines():
            operation = json.loads(line)
            try:
                self._server.apply(operation)
            except Rejected as error:
                log.warning("MLflow refuses %s of run %s: %s", operation["op"], operation["run"], error)
        self._storage.delete(rel)

    def _tell_away(self, why: str) -> None:
        with self._changed:
            self._write_gathered()
            self._away = why
            self._changed.notify_all()
        if not self._told:
            self._told = True
            say(
                f"Tracking: {self._shown} cannot be reached ({why}). The job goes on; what is to be "
                f"tracked is kept in {self._storage.uri(SPOOL)} and sent when the server is back."
            )

    def _tell_back(self) -> None:
        """Everything is sent; the lock is held."""
        if self._told:
            self._told = False
            say(f"Tracking: {self._shown} is back and has taken everything that was kept.")
        self._away = None
