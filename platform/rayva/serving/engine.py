"""Engines: what turns a checked conversation into text.

The HTTP interface knows only the `Engine` protocol. The built-in engine answers one request after
the other over the project's own model and runs anywhere; an engine that batches continuously, or
one that hands over to another server, takes its place by implementing `generate`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from rayva.model.folder import Assistant
from rayva.serving.errors import bad_request
from rayva.serving.schema import Sampling
from rayva.serving.stops import StopFilter
from rayva.text.conversation import Message


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. The last one of an answer, and only it, has a `finish` and the counts."""

    text: str
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """Turns conversations into text."""

    def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], sampling: Sampling
    ) -> AsyncIterator[Piece]:
        """Answers the last message piece by piece; `images` fill the image slots in order.

        Closing the iterator stops the generation at the next token.

        Raises:
            ApiError: the request cannot be answered, before the first piece.
        """
        ...

    async def ready(self) -> bool:
        """Whether a request would be answered now."""
        ...


class BuiltinEngine:
    """Answers over the project's own model, one request at a time, in a thread of its own.

    One thread, because a second generation would only share the same cores with the first one.
    """

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant
        self._context = assistant.model.context
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], sampling: Sampling
    ) -> AsyncIterator[Piece]:
        """See `Engine.generate`."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        cancelled = threading.Event()

        def produce() -> None:
            try:
                for piece in self._pieces(messages, images, sampling, cancelled):
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        done = loop.run_in_executor(self._thread, produce)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await done
        finally:
            cancelled.set()

    async def ready(self) -> bool:
        """See `Engine.ready`: once it is made, it can answer."""
        return True

    def close(self) -> None:
        """Ends the thread after the answer in progress."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _pieces(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        sampling: Sampling,
        cancelled: threading.Event,
    ) -> Iterator[Piece]:
        """Runs in the thread. A request that was given up before its turn costs nothing."""
        if cancelled.is_set():
            return
        prompt_tokens = self._assistant.prompt_length(messages)
        limit = self._room(prompt_tokens, sampling.max_new_tokens)
        features = self._assistant.encode_images(images)
        stops = StopFilter(sampling.stop)
        stream = self._assistant.stream(
            messages, features, limit, sampling.temperature, sampling.top_p, sampling.seed
        )
        for written in stream:
            if cancelled.is_set():
                return
            shown = stops.push(written.text)
            finish = "stop" if stops.stopped else written.finish
            if finish is not None:
                yield Piece(shown + stops.flush(), finish, prompt_tokens, written.tokens)
                return
            if shown:
                yield Piece(shown)

    def _room(self, prompt_tokens: int, wanted: int) -> int:
        """Tokens that may be generated: as many as wanted, or as many as the context still holds."""
        if self._context is None:
            return wanted
        room = self._context - prompt_tokens
        if room <= 0:
            what = f"the conversation takes {prompt_tokens} tokens; the model's context is {self._context}"
            raise bad_request(what, "messages", "context_length_exceeded")
        return min(wanted, room)
