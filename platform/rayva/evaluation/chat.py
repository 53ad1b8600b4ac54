"""Asks a chat endpoint many questions at once, for code that is not async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rayva.errors import RayvaError, ServingError
from rayva.llm.cache import AnswerCache
from rayva.llm.client import ChatClient, Endpoint
from rayva.llm.request import ChatAnswer, ChatRequest, PassingError, PermanentError

Told = Callable[[ChatRequest, ChatAnswer | str], None]
"""Is given each request with its answer, or with the reason why this question alone has none."""

_FAILURES_IN_A_ROW = 10
"""At least so many questions fail one after the other, after all attempts, before all are given up."""


@dataclass(frozen=True)
class ChatModel:
    """A model behind an OpenAI-compatible endpoint, and how hard it may be asked."""

    model: str
    endpoint: Endpoint = field(repr=False)

    @property
    def shown(self) -> str:
        """The model for people to read."""
        return f"{self.model} at {self.endpoint.base_url}"

    def describe(self) -> dict[str, Any]:
        """What identifies it."""
        return {"endpoint": self.endpoint.base_url, "model": self.model}

    def ask_all(
        self,
        requests: Iterable[ChatRequest],
        told: Told,
        cache: AnswerCache | None = None,
        doubtful: Container[str] = (),
    ) -> None:
        """Asks all requests, `endpoint.concurrency` at a time; they are made as they are needed.

        A question at which the endpoint goes on failing is told with the reason, as a refused one is.

        Args:
            doubtful: digests of requests that have failed before, which says nothing of the others.

        Raises:
            ServingError: the endpoint is not there, refuses everything, or fails at many questions in a row.
        """
        failures = _Failures(max(_FAILURES_IN_A_ROW, 2 * self.endpoint.concurrency), doubtful)
        asyncio.run(self._ask_all(iter(requests), told, cache, failures))

    async def _ask_all(
        self, requests: Iterator[ChatRequest], told: Told, cache: AnswerCache | None, failures: _Failures
    ) -> None:
        try:
            async with ChatClient(self.endpoint, cache) as client, asyncio.TaskGroup() as group:
                for _ in range(self.endpoint.concurrency):
                    group.create_task(_work(client, requests, told, failures))
        except* (PassingError, PermanentError, RayvaError) as errors:
            first = errors.exceptions[0]
            if isinstance(first, RayvaError):
                raise first from None
            raise ServingError(
                f"{self.endpoint.base_url} does not answer for {self.model!r}: {first}",
                f"check the address, the model's name, and the key in {self.endpoint.api_key_env}; then give "
                "the same command again: what is answered is not asked again",
            ) from first
        finally:
            if cache is not None:
                cache.close()


@dataclass
class _Failures:
    """Tells an endpoint that is away from one that fails at some questions."""

    limit: int
    doubtful: Container[str]
    in_a_row: int = 0
    heard: bool = False
    """Whether anything has come back yet."""

    def none(self) -> None:
        """A question was answered or refused: the endpoint works."""
        self.in_a_row, self.heard = 0, True

    def one(self, request: ChatRequest, error: PassingError) -> None:
        """A question has failed for good; raises `error` where others would fail, too."""
        self.in_a_row += request.digest not in self.doubtful
        self.heard = self.heard or error.reached
        if not self.heard or self.in_a_row >= self.limit:
            raise error


async def _work(client: ChatClient, requests: Iterator[ChatRequest], told: Told, failures: _Failures) -> None:
    for request in requests:
        try:
            answer: ChatAnswer | str = await client.ask(request)
            failures.none()
        except PermanentError as error:
            if error.fatal:
                raise
            failures.none()
            answer = str(error)
        except PassingError as error:
            failures.one(request, error)
            answer = str(error)
        told(request, answer)


def endpoint(url: str, key_env: str, concurrency: int, first_delay: float = 0.5) -> Endpoint:
    """An endpoint by its address, with or without `/v1`.

    Raises:
        RecipeError: the address cannot be one, or holds a password.
    """
    base = url.rstrip("/")
    if urlsplit(base).path == "":
        base += "/v1"
    made = Endpoint(base, key_env, concurrency, timeout=300.0, first_delay=first_delay)
    made.check()
    return made
