"""The client of an OpenAI-compatible endpoint: bounded concurrency, limits, and retries that know why.

Rayva makes hundreds of small calls a second from one core, needs the raw headers (`Retry-After`), and has to
tell a body that was cut from one that was never sent; so it speaks HTTP through aiohttp, which Ray brings
along, rather than through a vendor's client with retries of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayva.errors import RecipeError
from rayva.llm.cache import AnswerCache
from rayva.llm.dialect import Dialect
from rayva.llm.limits import RateLimit
from rayva.llm.prices import FREE, Budget, Price
from rayva.llm.request import (
    ChatAnswer,
    ChatRequest,
    LLMError,
    PassingError,
    PermanentError,
    read_completion,
    told_status,
)

if TYPE_CHECKING:
    import aiohttp

_PASSING = {408, 409, 425, 429}
_FATAL = {401, 403, 404, 405}
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting helps against."""
_MAX_DELAY_SECONDS = 60.0
_MAX_RETRY_AFTER_SECONDS = 600.0
_FAILURES_IN_A_ROW = 50
"""Without any success between them; then an endpoint is away, and to ask on would take days."""


class BudgetSpent(LLMError):
    """The call was not made: it might cost more than what is left."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        base_url: up to and including the version, such as https://api.openai.com/v1.
        api_key_env: name of the environment variable with the key; an unset one means no key.
        timeout: seconds for a whole call.
        attempts: how often a call is made before a passing error ends it.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    attempts: int = 6
    first_delay: float = 0.5

    def check(self) -> None:
        """Raises `RecipeError` where the address cannot be one, or would carry a key in the open."""
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                f"The endpoint {self.base_url!r} is no http(s) address",
                "give one such as https://api.openai.com/v1",
            )
        if parts.username or parts.password:
            raise RecipeError(
                "The endpoint's address holds a user name or password",
                f"put the key into the environment variable {self.api_key_env}",
            )


class ChatClient:
    """Asks an endpoint; use it as an async context manager.

    Args:
        cache: every answer goes there before it is returned, and is taken from there if it is known.
        budget: calls that might pass it are not made.
        price: of the model, for the budget.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: AnswerCache | None = None,
        budget: Budget | None = None,
        price: Price = FREE,
    ) -> None:
        endpoint.check()
        self._endpoint, self._cache = endpoint, cache
        self._budget, self._price = budget or Budget(None), price
        self._limit = RateLimit(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._in_flight: dict[str, asyncio.Future[ChatAnswer]] = {}
        """What calls being made will answer, by digest."""
        self._settled = asyncio.Condition()
        self._resume_at = 0.0
        """When calls may start again after the endpoint has asked for a pause (monotonic clock)."""
        self._session: aiohttp.ClientSession | None = None
        self.calls = 0
        """HTTP requests made."""
        self._failed_in_a_row, self._last_failure = 0, ""
        self._dialect = Dialect()
        self.errors: Counter[str] = Counter()
        """Passing errors that were met, by kind."""

    async def __aenter__(self) -> ChatClient:
        import aiohttp

        key = os.environ.get(self._endpoint.api_key_env)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=self._endpoint.timeout),
            connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The answer to `request`. While the same is being asked already, that call's outcome is awaited.

        Raises:
            BudgetSpent: the call might cost more than is left.
            PermanentError: the endpoint refuses this call, or all (`fatal`).
            PassingError: it still failed after all attempts.
            StorageError: the answer cannot be kept.
        """
        while True:
            if self._cache is not None and (known := self._cache.get(request)) is not None:
                return known
            if (ahead := self._in_flight.get(request.digest)) is None:
                return await self._ask_first(request)
            await asyncio.wait([ahead])  # unlike `await ahead`, does not cancel it together with this caller
            if not ahead.cancelled():
                return replace(ahead.result(), cached=True)

    async def _ask_first(self, request: ChatRequest) -> ChatAnswer:
        """Asks, and tells the outcome to whoever asks the same meanwhile; they go on if this is cancelled."""
        outcome: asyncio.Future[ChatAnswer] = asyncio.get_running_loop().create_future()
        self._in_flight[request.digest] = outcome
        try:
            answer = await self._ask(request)
            outcome.set_result(answer)
            return answer
        except Exception as error:
            outcome.set_exception(error)
            outcome.exception()  # nobody else may be waiting for it
            raise
        finally:
            outcome.cancel()  # does nothing where there is an outcome
            del self._in_flight[request.digest]

    async def _ask(self, request: ChatRequest) -> ChatAnswer:
        """Calls until there is an answer, as often as the endpoint allows.

        An endpoint that has failed at many requests in a row, each after all its attempts, is given up.
        """
        async with self._slots:
            if self._failed_in_a_row >= max(_FAILURES_IN_A_ROW, 3 * self._endpoint.concurrency):
                raise PassingError(
                    f"given up: {self._failed_in_a_row} requests in a row; {self._last_failure}"
                )
            for attempt in range(1, self._endpoint.attempts + 1):
                try:
                    answer = await self._paid_call(request)
                    self._failed_in_a_row = 0
                    return answer
                except PassingError as error:
                    self.errors[str(error).partition(":")[0]] += 1
                    if attempt == self._endpoint.attempts:
                        self._failed_in_a_row += 1
                        self._last_failure = f"{error} (after {attempt} attempts)"
                        raise PassingError(self._last_failure, reached=error.reached) from error
                    await self._wait(attempt, error.retry_after)
                except PermanentError:
                    self._failed_in_a_row = 0  # it is there, and answers
                    raise
        raise AssertionError("unreachable")

    async def _admitted(self, tokens: int) -> None:
        """Waits until neither the endpoint's own words nor the limits hold a call of `tokens` tokens back."""
        while True:
            await self._pause()
            await self._limit.acquire(tokens)
            if time.monotonic() >= self._resume_at:
                return
            # A pause was asked for meanwhile: the call starts later, and counts then.
            self._limit.give_back(tokens)

    async def _pause(self) -> None:
        while (left := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _wait(self, attempt: int, retry_after: float | None) -> None:
        if retry_after is not None:
            # The endpoint speaks to all callers, not to this call alone.
            seconds = min(retry_after, _MAX_RETRY_AFTER_SECONDS)
            self._resume_at = max(self._resume_at, time.monotonic() + seconds)
            return
        longest = min(_MAX_DELAY_SECONDS, self._endpoint.first_delay * 2 ** (attempt - 1))
        await asyncio.sleep(random.uniform(longest / 2, longest))

    async def _paid_call(self, request: ChatRequest) -> ChatAnswer:
        """One call within the budget, its answer kept."""
        worst = self._price.at_most(request)
        async with self._settled:
            while not self._budget.reserve(worst):
                if not self._budget.waits:
                    raise BudgetSpent(f"a call may cost ${worst:.4f}, and that much is not left")
                await self._settled.wait()
        paid = 0.0
        try:
            answer = await self._call(request)
            paid = self._price.of_answer(answer)
            if self._cache is not None:
                await self._cache.put(request, answer)
            return answer
        except PassingError as error:
            if error.billed:
                paid = worst
                if self._cache is not None:
                    await self._cache.put_lost(request)
            raise
        finally:
            async with self._settled:
                self._budget.settle(worst, paid)
                self._settled.notify_all()

    async def _call(self, request: ChatRequest) -> ChatAnswer:
        import aiohttp

        assert self._session is not None, "use the client as an async context manager"
        estimated = request.estimated_prompt_tokens() + request.sampling.max_tokens
        await self._admitted(estimated)
        url = f"{self._endpoint.base_url.rstrip('/')}/chat/completions"
        sent = self._dialect.body(request)
        started = time.monotonic()
        self.calls += 1
        try:
            async with self._session.post(url, json=sent) as response:
                content = await response.read()
                status, headers = response.status, response.headers
        except TimeoutError as error:
            what = f"timeout: no answer within {self._endpoint.timeout:g} s"
            raise PassingError(what, billed=True) from error
        except aiohttp.ClientPayloadError as error:
            raise PassingError(f"cut: the answer broke off: {error}", billed=True) from error
        except aiohttp.ClientError as error:
            reached = not isinstance(error, aiohttp.ClientConnectorError)
            raise PassingError(f"connection: {error}", billed=reached, reached=reached) from error
        if (refused := self._dialect.learn(status, content, sent)) is not None:
            raise PassingError(f"dialect: the endpoint does not take {refused}")
        if status != 200:
            raise _refusal(status, headers.get("Retry-After"), content)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PassingError(f"not JSON: {error}", billed=True) from error
        if (told := told_status(body)) is not None:
            raise _refusal(told, None, content)
        answer = read_completion(body, request, time.monotonic() - started)
        self._limit.correct(estimated, answer.prompt_tokens + answer.completion_tokens)
        return answer


def _refusal(status: int, retry_after: str | None, content: bytes) -> LLMError:
    """Why the endpoint did not answer, in our terms."""
    text = content[:500].decode("utf-8", "replace").strip()
    message = _message(content) or text[:200]
    what = f"HTTP {status}: {message}"
    if status == 429 and any(code in text for code in _QUOTA):
        return PermanentError(what, fatal=True)
    if status in _PASSING or status >= 500:
        return PassingError(what, parse_retry_after(retry_after))
    return PermanentError(what, fatal=status in _FATAL)


def _message(content: bytes) -> str | None:
    try:
        body: Any = json.loads(content)
        error = body["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:200]
    except (ValueError, KeyError, TypeError):
        return None


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110, 10.2.3: a number or a date); None if it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds == seconds and seconds != float("inf") else None
