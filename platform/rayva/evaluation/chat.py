"""Asks a chat endpoint many questions at once, for code that is not async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rayva.errors import RayvaError, ServingError
from rayva.llm.cache import AnswerCache
from rayva.llm.client import ChatClient, Endpoint
from rayva.llm.request import ChatAnswer, ChatRequest, PassingError, PermanentError

Told = Callable[[ChatRequest, ChatAnswer | str], None]
"""Is given each request with its answer, or with the reason why this question alone is refused."""


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

    def ask_all(self, requests: Iterable[ChatRequest], told: Told, cache: AnswerCache | None = None) -> None:
        """Asks all requests, `endpoint.concurrency` at a time; they are made as they are needed.

        Raises:
            ServingError: the endpoint refuses everything, or goes on failing at one question.
        """
        asyncio.run(self._ask_all(iter(requests), told, cache))

    async def _ask_all(self, requests: Iterator[ChatRequest], told: Told, cache: AnswerCache | None) -> None:
        try:
            async with ChatClient(self.endpoint, cache) as client, asyncio.TaskGroup() as group:
                for _ in range(self.endpoint.concurrency):
                    group.create_task(_work(client, requests, told))
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


async def _work(client: ChatClient, requests: Iterator[ChatRequest], told: Told) -> None:
    for request in requests:
        try:
            answer: ChatAnswer | str = await client.ask(request)
        except PermanentError as error:
            if error.fatal:
                raise
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
