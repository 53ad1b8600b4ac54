"""How many calls go out at once, and when, by what the endpoint refuses.

An endpoint that refuses calls because there are too many speaks to all callers: all of them pause, then go
out one after the other, and fewer are in flight until it answers again. Where nothing is refused, nothing
waits.
"""

from __future__ import annotations

import asyncio
import random
import time

from rayva.llm.limits import RateLimit

_FIRST_GAP_SECONDS = 0.03
_MAX_GAP_SECONDS = 1.0
_NO_GAP_SECONDS = 0.001
"""A shorter gap between two calls is none."""
_GAP_KEPT = 0.98
"""What an answer leaves of the gap: half of it is gone after about 35 answers."""


class Gate:
    """Lets calls out.

    Args:
        most: calls in flight, where nothing is refused.
        limit: on requests and tokens a minute.
    """

    def __init__(self, most: int, limit: RateLimit) -> None:
        self._most, self._limit = most, limit
        self._allowed = float(most)
        self._in_flight = 0
        self._gap = 0.0
        """Seconds between two calls."""
        self._resume_at = 0.0
        """When calls may start again after the endpoint has asked for a pause (monotonic clock)."""
        self._reduced_at = 0.0
        self._answered_since = True
        """Whether a call has been answered since the last reduction."""
        self._refused_since: float | None = None
        self._door = asyncio.Lock()
        self._room = asyncio.Event()

    @property
    def refused_for(self) -> float:
        """Seconds since the first refusal after the last answer."""
        return 0.0 if self._refused_since is None else time.monotonic() - self._refused_since

    async def enter(self, tokens: int) -> float:
        """Waits until a call of about `tokens` tokens may start; when it did (monotonic clock).

        `leave` must follow.
        """
        async with self._door:
            while True:
                await self._opened()
                await self._limit.acquire(tokens)
                if not self._closed():
                    break
                # A pause was asked for meanwhile: the call starts later, and counts then.
                self._limit.give_back(tokens)
            self._in_flight += 1
            return time.monotonic()

    def leave(self) -> None:
        """The call has ended, in whatever way."""
        self._in_flight -= 1
        self._room.set()

    def answered(self) -> None:
        """The endpoint took a call: more may go out, and sooner."""
        self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)
        self._gap *= _GAP_KEPT
        if self._gap < _NO_GAP_SECONDS:
            self._gap = 0.0
        self._answered_since, self._refused_since = True, None
        self._room.set()

    def refused(self, started: float, pause: float) -> None:
        """The endpoint had too many calls.

        Args:
            started: what `enter` told for the call. Those that were in flight together tell the same thing,
                and count once.
            pause: seconds that the endpoint asks for.
        """
        now = time.monotonic()
        self._resume_at = max(self._resume_at, now + pause)
        if self._refused_since is None:
            self._refused_since = now
        if started <= self._reduced_at:
            return
        self._reduced_at = now
        if self._answered_since:
            # Without an answer in between, those in flight may all be calls that were taken.
            self._allowed = max(1.0, self._allowed / 2)
            self._gap = max(self._gap, _FIRST_GAP_SECONDS)
        else:
            self._gap = min(_MAX_GAP_SECONDS, max(_FIRST_GAP_SECONDS, 2 * self._gap))
        self._answered_since = False

    async def _opened(self) -> None:
        while True:
            while (left := self._resume_at - time.monotonic()) > 0:
                await asyncio.sleep(left)
            while self._full():
                self._room.clear()
                await self._room.wait()
            if self._gap:
                await asyncio.sleep(self._gap * random.uniform(0.5, 1.5))
            if not self._closed() and not self._full():
                return

    def _closed(self) -> bool:
        return time.monotonic() < self._resume_at

    def _full(self) -> bool:
        return self._in_flight >= int(self._allowed)
