"""Progress for people: what, how far, how fast, how long still."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

_LIVE_SECONDS = 0.25
_LINE_SECONDS = 5.0


def say(text: str) -> None:
    """Writes a line for people to stderr; only rank 0 of several workers speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`seconds` for people: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Counts work and tells of it at most every few seconds: a live line on a terminal, else lines.

    Args:
        what: what is being done, for example "pretrain".
        total: how many units there are; None where that is not known.
        unit: what is counted, in the plural ("images", "steps").
        done: units that an earlier attempt has already done; they do not count for the rate.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._first = done
        self._figures: dict[str, float | str] = {}
        self._started = self._shown = time.monotonic()
        self._silent = os.environ.get("RANK", "0") != "0"
        self._live = sys.stderr.isatty()
        self._closed = False

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """`n` more units are done; `figures` (loss=0.41) are shown behind."""
        self.done += n
        self._figures.update(figures)
        now = time.monotonic()
        if now - self._shown >= (_LIVE_SECONDS if self._live else _LINE_SECONDS):
            self._shown = now
            self._show(end="" if self._live else "\n")

    def close(self) -> None:
        """Shows the last state, once."""
        if not self._closed:
            self._closed = True
            self._show(end="\n")

    def line(self) -> str:
        """The present state as one line."""
        seconds = time.monotonic() - self._started
        rate = (self.done - self._first) / seconds if seconds > 0 else 0.0
        parts = [f"  {self.what}: {self.done:,}"]
        if self.total is not None:
            share = f" ({100 * self.done // self.total} %)" if self.total else ""
            parts[0] += f"/{self.total:,} {self.unit}{share}"
        else:
            parts[0] += f" {self.unit}"
        parts.append(f"{rate:,.1f} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s")
        if self._closed or (self.total is not None and self.done >= self.total):
            parts.append(f"took {duration(seconds)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        parts += [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self._figures.items()
        ]
        return ", ".join(parts)

    def _show(self, end: str) -> None:
        if not self._silent:
            # "\x1b[K" clears what a longer live line has left behind.
            lead = "\r\x1b[K" if self._live else ""
            print(lead + self.line(), end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
