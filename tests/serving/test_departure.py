"""A client that leaves in the middle of its request or of a streamed answer, as Serve tells of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import TaskCancelledError

from rayva.orchestration.serve import Departures
from rayva.serving.api import ApiSettings, build_api
from rayva.serving.engine import Piece
from tests.serving.conftest import LIMITS, question

SCOPE = {
    "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
    "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "server": ("a", 80),
    "asgi": {"version": "3.0", "spec_version": "2.3"},
}  # fmt: skip


class Endless:
    """An engine that writes until it is closed."""

    def __init__(self) -> None:
        self.closed = False

    async def generate(self, messages: object, images: object, sampling: object) -> AsyncIterator[Piece]:
        try:
            while True:
                yield Piece("x")
                await asyncio.sleep(0)
        finally:
            self.closed = True

    async def ready(self) -> bool:
        return True


def test_leaving_ends_the_answer_and_is_no_failure() -> None:
    engine, heard = Endless(), asyncio.Event()
    api = build_api(engine, ApiSettings("tiny", LIMITS))
    api.add_middleware(Departures)
    body = json.dumps({"model": "tiny", "messages": question("What?"), "stream": True}).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await heard.wait()
        raise TaskCancelledError

    async def send(message: dict[str, Any]) -> None:
        if b"x" in message.get("body", b""):
            heard.set()

    asyncio.run(asyncio.wait_for(api(dict(SCOPE), receive, send), 60))
    assert heard.is_set()
    assert engine.closed


def test_leaving_before_the_request_is_whole_is_no_failure() -> None:
    api = build_api(Endless(), ApiSettings("tiny", LIMITS))
    api.add_middleware(Departures)
    requests = [{"type": "http.request", "body": b'{"model": "ti', "more_body": True}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        raise TaskCancelledError

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status") != 500

    asyncio.run(asyncio.wait_for(api(dict(SCOPE), receive, send), 60))
