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
import re
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayva.errors import RecipeError
from rayva.llm.cache import AnswerCache
from rayva.llm.dialect import Dialect
from rayva.llm.gate import Gate
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
_FATAL = {401, 402, 403, 404, 405}
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting helps against."""
_NO_MODEL = re.compile(r"model_not_found|\bmodel\b.{0,100}\bnot (exist|found)\b", re.IGNORECASE)
"""How endpoints that answer 400 for it say that they have not the model."""
_MAX_DELAY_SECONDS = 60.0
_MIN_RETRY_AFTER_SECONDS, _MAX_RETRY_AFTER_SECONDS = 0.1, 600.0
_MAX_REFUSED_SECONDS = 900.0
"""How long an endpoint may ask for pauses without an answer to anything."""
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
        attempts: how often a call is made before a passing error ends it. Refusals that name a pause
            (`Retry-After`) do not count.
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
        self._gate = Gate(endpoint.concurrency, self._limit)
        # The gate holds the calls in flight to the concurrency. A few requests more may be under way, so
        # that the endpoint does not wait while answers are written to the storage.
        self._slots = asyncio.Semaphore(endpoint.concurrency + endpoint.concurrency // 4)
        self._in_flight: dict[str, asyncio.Future[ChatAnswer]] = {}
        """What calls being made will answer, by digest."""
        self._settled = asyncio.Condition()
        self._session: aiohttp.ClientSession | None = None
        self.calls = 0
        """HTTP requests made."""
        self._failed_in_a_row, self._given_up = 0, ""
        self._answers, self._refuses_all = 0, False
        """Answers so far; whether the endpoint has refused all calls before it gave any."""
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

        An endpoint that has failed at many requests in a row, each after all its attempts, is given up, and
        so is one that has asked for pauses for long without an answer to anything.
        """
        async with self._slots:
            failed = 0
            while True:
                self._check_given_up()
                try:
                    answer = await self._paid_call(request)
                except PassingError as error:
                    if self._given_up:
                        raise
                    self.errors[str(error).partition(":")[0]] += 1
                    if error.retry_after is None:
                        failed += 1
                        if failed == self._endpoint.attempts:
                            raise self._failure(
                                f"{error} (after {failed} attempts)", error.reached
                            ) from error
                        await self._back_off(failed)
                    elif self._gate.refused_for > _MAX_REFUSED_SECONDS:
                        minutes = f"{self._gate.refused_for / 60:.0f} minutes"
                        self._given_up = f"given up: no answer to anything for {minutes}; {error}"
                        raise PassingError(self._given_up) from error
                else:
                    self._failed_in_a_row, self._given_up = 0, ""
                    return answer

    def _check_given_up(self) -> None:
        if self._given_up:
            raise PassingError(self._given_up, reached=False)

    def _failure(self, what: str, reached: bool) -> PassingError:
        """A request has failed after all its attempts."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(_FAILURES_IN_A_ROW, 3 * self._endpoint.concurrency):
            self._given_up = f"given up: {self._failed_in_a_row} requests in a row; {what}"
        return PassingError(what, reached=reached)

    async def _back_off(self, failed: int) -> None:
        longest = min(_MAX_DELAY_SECONDS, self._endpoint.first_delay * 2 ** (failed - 1))
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
            answer = await self._gated_call(request)
            paid = self._price.of_answer(answer)
            if self._cache is not None:
                await _finished(self._cache.put(request, answer))
            return answer
        except (PassingError, _CancelledCall) as error:
            if error.billed:
                paid = worst
                if self._cache is not None:
                    await _finished(self._cache.put_lost(request))
            if isinstance(error, _CancelledCall):
                raise error.cancelled from None
            raise
        finally:
            async with self._settled:
                self._budget.settle(worst, paid)
                self._settled.notify_all()

    async def _gated_call(self, request: ChatRequest) -> ChatAnswer:
        """One call, when the endpoint's own words and the limits let it out."""
        estimated = request.estimated_prompt_tokens() + request.sampling.max_tokens
        started = await self._gate.enter(estimated)
        try:
            self._check_given_up()
            answer = await self._call(request)
            self._answers += 1
            self._gate.answered()
            self._limit.correct(estimated, answer.prompt_tokens + answer.completion_tokens)
            return answer
        except PassingError as error:
            if error.busy:
                self._gate.refused(started, error.retry_after or 0.0)
            raise
        except PermanentError as error:
            self._refuses_all = self._refuses_all or (error.fatal and not self._answers)
            raise
        except asyncio.CancelledError as error:
            # The endpoint has the request, and may answer it though nobody listens; unless the key is wrong.
            raise _CancelledCall(error, billed=not self._refuses_all) from error
        finally:
            self._gate.leave()

    async def _call(self, request: ChatRequest) -> ChatAnswer:
        import aiohttp

        assert self._session is not None, "use the client as an async context manager"
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
        return read_completion(body, request, time.monotonic() - started)


class _CancelledCall(Exception):
    """The caller was cancelled while the endpoint had its request."""

    def __init__(self, cancelled: asyncio.CancelledError, billed: bool) -> None:
        super().__init__()
        self.cancelled, self.billed = cancelled, billed


async def _finished(writing: Coroutine[Any, Any, None]) -> None:
    """Waits for `writing`; one who is cancelled meanwhile goes when it has ended: what is paid is kept."""
    task = asyncio.create_task(writing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        task.exception()  # whoever has been cancelled does not ask for it
        raise


def _refusal(status: int, retry_after: str | None, content: bytes) -> LLMError:
    """Why the endpoint did not answer, in our terms."""
    text = content[:500].decode("utf-8", "replace").strip()
    message = _message(content) or text[:200]
    what = f"HTTP {status}: {message}"
    if status == 429 and any(code in text for code in _QUOTA):
        return PermanentError(what, fatal=True)
    if status in _PASSING or status >= 500:
        pause = parse_retry_after(retry_after)
        if pause is not None:
            pause = min(max(pause, _MIN_RETRY_AFTER_SECONDS), _MAX_RETRY_AFTER_SECONDS)
        return PassingError(what, pause, busy=status == 429 or pause is not None)
    absent = status == 400 and _NO_MODEL.search(text) is not None
    return PermanentError(what, fatal=absent or status in _FATAL)


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
