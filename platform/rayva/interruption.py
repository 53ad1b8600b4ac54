"""Ctrl-C and SIGTERM, so that neither is lost nor told as something else.

Python raises KeyboardInterrupt in whatever its main thread runs at that moment. Where that is a callback or a
finaliser of the interpreter, most of all while modules are imported, it is printed and forgotten, and the
process goes on. Where compiled code has called it (pydantic's serializers, NumPy's import), it arrives as an
exception of that code.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from rayva.errors import RayvaError

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.05
"""From a lost interruption to its repetition: enough to be out of the callback that lost it."""


class Interruptions:
    """Context manager: while it is active, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    An interruption that the interpreter throws away is raised again, and one that arrives as the exception of
    a library leaves as KeyboardInterrupt; a `RayvaError` stays what it is, since it has something to tell. In
    another thread than the main one, which Python gives no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        """Whether there was one: an exception after it may be what became of it."""
        self._before: dict[signal.Signals, Any] = {}
        self._report = sys.unraisablehook

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)
            }
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # What Ray or a caller has put in place since is theirs to keep.
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, handler)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._report
        if self.received and isinstance(error, Exception) and not isinstance(error, RayvaError):
            log.debug("after an interruption", exc_info=error)
            raise KeyboardInterrupt from error

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        by_signal = threading.current_thread() is threading.main_thread()  # Python calls handlers in no other
        if not by_signal or not issubclass(lost.exc_type, KeyboardInterrupt):
            self._report(lost)
            return
        # By a signal, since what is raised in this hook would be lost as well; SIGINT's handler may by now
        # be another's, who has more to tell.
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
