"""The HTTP interface: an OpenAI-compatible chat API over any engine.

    POST /v1/chat/completions   GET /v1/models   GET /v1/models/{model}   GET /healthz

All errors have the form of the OpenAI API. A request is checked completely (size, schema, pictures)
before it takes a place in an engine's queue.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rayva.recipes.schema import Serving
from rayva.serving.engine import Engine, Piece
from rayva.serving.errors import ApiError, bad_request
from rayva.serving.keys import allowed
from rayva.serving.media import load_images, max_body_bytes
from rayva.serving.schema import Chat, parse_chat

logger = logging.getLogger(__name__)

_DRAINED = 8
"""A body of up to this many times the limit is read to its end before it is refused."""


@dataclass(frozen=True)
class ApiSettings:
    """What the interface needs to know beside its engine: the model's public name, limits, keys."""

    model_name: str
    limits: Serving = field(default_factory=Serving)
    key_digests: tuple[str, ...] = ()


def build_api(engine: Engine, settings: ApiSettings) -> FastAPI:
    """The application. There are no routes beside the documented ones (no schema, no docs pages)."""
    api = FastAPI(title="Rayva", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(api)
    card = _model_card(settings)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        if not await engine.ready():
            raise ApiError(503, "the model is not available just now", None, "model_unavailable")
        return {"status": "ok", "model": settings.model_name}

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(request, settings)
        return {"object": "list", "data": [card]}

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        _authorise(request, settings)
        _check_model(name, settings)
        return card

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        _authorise(request, settings)
        payload = _parse_json(await _read_body(request, max_body_bytes(settings.limits)))
        name, chat = parse_chat(payload, settings.limits)
        _check_model(name, settings)
        images = await asyncio.to_thread(load_images, chat.image_uris, settings.limits)
        pieces = engine.generate(chat.messages, images, chat.sampling)
        return await _respond(pieces, chat, settings.model_name)

    return api


def _authorise(request: Request, settings: ApiSettings) -> None:
    if not allowed(request.headers.get("authorization"), settings.key_digests):
        raise ApiError(
            401, "a valid API key is required (Authorization: Bearer KEY)", None, "invalid_api_key"
        )


def _check_model(name: str, settings: ApiSettings) -> None:
    if name != settings.model_name:
        what = f"the model '{name}' is not served here; '{settings.model_name}' is"
        raise ApiError(404, what, "model", "model_not_found")


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, if it is no longer than `limit` bytes.

    A longer one is read on without being kept, because a client that is cut off in mid-sentence sees a
    broken connection instead of the reason; one that sends far more is cut off.
    """
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= limit:
            body += chunk
        elif received > _DRAINED * limit:
            break
    if received > limit:
        message = f"the request body is larger than {limit} bytes"
        raise ApiError(413, message, None, "request_too_large")
    return bytes(body)


def _parse_json(body: bytes) -> object:
    """The body's content.

    Half of a surrogate pair, which JSON can write and no text can hold, is refused.
    """
    try:
        payload = json.loads(body)
        json.dumps(payload, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("the body holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    return payload


async def _respond(pieces: AsyncIterator[Piece], chat: Chat, model: str) -> Response:
    answer = _Answer(model)
    if not chat.stream:
        return JSONResponse(answer.completion([piece async for piece in pieces]))
    # The first piece is awaited here, so that an error has its status code rather than a 200.
    first = await anext(pieces)
    events = _events(first, pieces, answer, chat.include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(
    first: Piece, rest: AsyncIterator[Piece], answer: _Answer, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of one streamed answer."""
    yield _event(answer.chunk({"role": "assistant", "content": ""}))
    last = first
    try:
        if first.text:
            yield _event(answer.chunk({"content": first.text}))
        async for last in rest:
            if last.text:
                yield _event(answer.chunk({"content": last.text}))
    except ApiError as error:
        # The status line is gone by now; clients look for an error event.
        yield _event(error.body())
        return
    yield _event(answer.chunk({}, last.finish))
    if include_usage:
        yield _event({**answer.chunk(None), "usage": _usage(last)})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Answer:
    """Builds the bodies of one answer, which share an id and a time."""

    def __init__(self, model: str) -> None:
        self._base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def completion(self, pieces: list[Piece]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": pieces[-1].finish}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": _usage(pieces[-1])}

    def chunk(self, delta: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        choices = []
        if delta is not None:
            choices.append({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish})
        return {**self._base, "object": "chat.completion.chunk", "choices": choices}


def _usage(last: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def _model_card(settings: ApiSettings) -> dict[str, Any]:
    return {"id": settings.model_name, "object": "model", "created": int(time.time()), "owned_by": "rayva"}


def _add_error_handlers(api: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        if not isinstance(error, ApiError):
            raise error
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    async def routing(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        body = ApiError(error.status_code, str(error.detail)).body()
        return JSONResponse(body, status_code=error.status_code)

    async def left(_: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it: the client went before its request was whole

    async def unknown(_: Request, error: Exception) -> Response:
        logger.error("request failed", exc_info=error)
        return JSONResponse(ApiError(500, "the server failed; see its log").body(), status_code=500)

    api.add_exception_handler(ApiError, known)
    api.add_exception_handler(HTTPException, routing)
    api.add_exception_handler(ClientDisconnect, left)
    api.add_exception_handler(Exception, unknown)
