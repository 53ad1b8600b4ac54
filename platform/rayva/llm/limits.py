"""Limits on requests and tokens a minute."""

from __future__ import annotations

import asyncio
import time

_MINUTE = 60.0
_BURST_SECONDS = 5.0
"""How much of a minute's allowance may be used at once."""
_SPARE = 0.02
"""What is left of an allowance too small for bursts, since calls do not arrive as evenly as they leave."""


class _Bucket:
    """A token bucket that holds a few seconds' worth of `per_minute`.

    What it holds and what it gains in a minute are `per_minute` together: that is the most in any minute.
    """

    def __init__(self, per_minute: float) -> None:
        self.room = max(1.0, per_minute * _BURST_SECONDS / _MINUTE)
        # With room for one there are no bursts: calls come evenly.
        spare = self.room if self.room > 1 else _SPARE * per_minute
        self.rate = (per_minute - spare) / _MINUTE
        self.level, self.at = self.room, time.monotonic()

    def take(self, amount: float) -> float:
        """Takes `amount`, going below zero if need be; seconds until it is paid for."""
        now = time.monotonic()
        self.level = min(self.room, self.level + (now - self.at) * self.rate)
        self.at = now
        self.level -= amount
        return max(0.0, -self.level / self.rate)


class RateLimit:
    """Holds calls back so that an endpoint's limits are kept; None is no limit."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._requests = _Bucket(requests_per_minute) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute) if tokens_per_minute else None

    async def acquire(self, tokens: int) -> None:
        """Waits until a call of about `tokens` tokens, prompt and answer, may start."""
        waits = [self._requests.take(1.0)] if self._requests else []
        waits += [self._tokens.take(float(tokens))] if self._tokens else []
        if waits and max(waits) > 0:
            await asyncio.sleep(max(waits))

    def give_back(self, tokens: int) -> None:
        """Undoes `acquire` for a call that does not start after all."""
        if self._requests:
            self._requests.take(-1.0)
        if self._tokens:
            self._tokens.take(-float(tokens))

    def correct(self, estimated: int, actual: int) -> None:
        """Takes back what a call was thought to use beyond what it did use, or the other way about."""
        if self._tokens:
            self._tokens.take(float(actual - estimated))
