"""A client of the chat API with the standard library alone: for `rayva chat` and the demo."""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayva.errors import DataError, ServingError

ENVIRONMENT = "RAYVA_API_KEY"
_TIMEOUT_SECONDS = 600.0
_KINDS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}


class ChatClient:
    """Talks to one endpoint; the key is taken from RAYVA_API_KEY where there is one."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ServingError(f"{url} is no address of an endpoint", "write http://HOST:PORT")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = api_key or os.environ.get(ENVIRONMENT)

    def models(self) -> list[str]:
        """Names of the models that are served."""
        with self._open("/v1/models", None) as response:
            return [str(card["id"]) for card in json.load(response)["data"]]

    def stream(
        self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int | None = None
    ) -> Iterator[str]:
        """The answer to a conversation in the API's form, piece by piece.

        Raises:
            ServingError: the endpoint cannot be reached, or refuses, with its reason.
        """
        body = {"model": model, "messages": list(messages), "stream": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        with self._open("/v1/chat/completions", body) as response:
            for line in response:
                event = line.decode().strip().removeprefix("data: ")
                if event in ("", "[DONE]"):
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    raise ServingError(f"the endpoint gave up: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""

    def _open(self, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise ServingError(f"{self._url} refuses ({error.code}): {_message(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(
                f"{self._url} cannot be reached: {error}", "start it with: python pipelines/serve.py"
            ) from error
        return response


def user_message(text: str, pictures: Sequence[bytes] = ()) -> dict[str, Any]:
    """A user message in the API's form, with encoded pictures before the text."""
    images = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def data_uri(picture: bytes) -> str:
    """A picture file's bytes as a data URI."""
    kind = next((name for start, name in _KINDS.items() if picture.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def read_picture(path: Path) -> bytes:
    """A picture file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the picture {path} cannot be read: {error.strerror}", "check the path") from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200] or error.reason
