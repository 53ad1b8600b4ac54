"""Stopping in an orderly way on SIGTERM: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rayva.errors import TrainingError

_requested = threading.Event()


class TrainingStopped(TrainingError):
    """Training was asked to stop, and has saved what it had done, if it could."""

    def __init__(self, step: int, saved: bool) -> None:
        place = "there" if saved else "the last checkpoint that could be saved; this one could not"
        super().__init__(
            f"Training was stopped after step {step} by a signal.",
            f"give the same command again: it goes on from {place}",
        )
        self.step, self.saved = step, saved

    def __reduce__(self) -> tuple[type[TrainingStopped], tuple[int, bool]]:
        return TrainingStopped, (self.step, self.saved)


def request_stop() -> None:
    """Asks the training in this process to save and stop after its step."""
    _requested.set()


def stop_requested() -> bool:
    """Whether `request_stop` was called."""
    return _requested.is_set()


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM calls `request_stop`. Python takes handlers in the main thread only: elsewhere, nothing."""
    _requested.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
