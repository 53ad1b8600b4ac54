"""A client of the chat API with the standard library alone: for `rayva chat` and the demo."""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rayva.errors import DataError, ServingError

ENVIRONMENT = "RAYVA_API_KEY"
_TIMEOUT_SECONDS = 600.0
_FIELDS = ("event", "id", "retry")
"""What server-sent events have beside data and comments."""
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
        if not _is_http(url):
            raise ServingError(f"{url} is no address of an endpoint", "write http://HOST:PORT")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = api_key or os.environ.get(ENVIRONMENT)
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise ServingError("The API key holds a character that none can hold", f"check {ENVIRONMENT}")

    def models(self) -> list[str]:
        """Names of the models that are served.

        Raises:
            ServingError: the endpoint cannot be reached, refuses, or is none of this API.
        """
        with self._open("/v1/models", None) as response:
            try:
                return [str(card["id"]) for card in json.load(response)["data"]]
            except (OSError, http.client.HTTPException) as error:
                raise self._broken_off(error) from error
            except (ValueError, KeyError, TypeError) as error:
                raise self._unknown("/v1/models") from error

    def stream(
        self, model: str, messages: Sequence[dict[str, Any]], max_tokens: int | None = None
    ) -> Iterator[str]:
        """The answer to a conversation in the API's form, piece by piece.

        Raises:
            ServingError: the endpoint cannot be reached, refuses, with its reason, or gives no whole answer.
        """
        body = {"model": model, "messages": list(messages), "stream": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        whole = False
        with self._open("/v1/chat/completions", body) as response:
            try:
                for event in _events(response):
                    if event == "[DONE]":
                        return
                    for text, finish in _pieces(event):
                        whole = whole or finish
                        yield text
            except (OSError, http.client.HTTPException) as error:
                raise self._broken_off(error) from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._unknown("/v1/chat/completions") from error
        if not whole:
            raise self._broken_off("it ended before the answer did")

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
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ServingError(
                f"{self._url} cannot be reached: {error}", "start it with: python pipelines/serve.py"
            ) from error
        return response

    def _broken_off(self, why: object) -> ServingError:
        return ServingError(
            f"The answer of {self._url} broke off: {why}", "ask again; see the endpoint's log"
        )

    def _unknown(self, path: str) -> ServingError:
        return ServingError(
            f"{self._url} does not answer {path} as an OpenAI-compatible endpoint does", "check the address"
        )


def _is_http(url: str) -> bool:
    try:
        return urllib.parse.urlsplit(url).scheme in ("http", "https")
    except ValueError:  # a bracket of an IPv6 address that is not closed
        return False


def _events(lines: Iterable[bytes]) -> Iterator[str]:
    """Data of server-sent events. Comments, which keep a connection open, and other fields are skipped.

    Raises:
        ValueError: the lines are none of such events.
    """
    found = False
    for line in lines:
        if line.startswith(b"data:") and not line.endswith(b"\n") and b"[DONE]" not in line:
            return  # cut, maybe within a character
        field, _, value = line.decode().strip().partition(":")
        if field == "data":
            found = True
            yield value.strip()
        elif field and not found and field not in _FIELDS:
            raise ValueError(f"no event: {line!r}")


def _pieces(event: str) -> Iterator[tuple[str, bool]]:
    """Text of each choice in a chunk of an answer, and whether the answer ends with it.

    Raises:
        ServingError: the event tells of a failure.
        ValueError, KeyError, TypeError, AttributeError: it is no chunk.
    """
    chunk = json.loads(event)
    if "error" in chunk:
        raise ServingError(f"the endpoint gave up: {chunk['error']['message']}")
    for choice in chunk["choices"]:
        yield choice["delta"].get("content") or "", choice.get("finish_reason") is not None


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
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200] or error.reason
