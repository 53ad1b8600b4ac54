"""Asks a model about pictures, in the terminal: a served one (--url) or a folder's (--model).

Type a question and Enter. `/image FILE` shows another picture and starts anew, `/new` starts anew,
`/quit` or Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from rayva.errors import DataError, RayvaError, ServingError
from rayva.recipes.schema import Serving
from rayva.serving.client import ChatClient, read_picture, user_message

_LARGEST_PICTURE = 64 * 1024 * 1024
_FAILED = 2
Ask = Callable[[list[dict[str, Any]]], Iterator[str]]
"""From a conversation in the API's form to the pieces of the answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="same as --model")
    parser.add_argument("--url", help="address of an endpoint, for example http://127.0.0.1:8000")
    parser.add_argument("--model", help="model folder, storage root of a run, or models:/NAME@ALIAS")
    parser.add_argument("--tracking-uri", help="where the registry is, for models:/...")
    parser.add_argument("--image", type=Path, help="the picture to talk about")
    parser.add_argument(
        "--max-tokens", type=_at_least_one, help="longest answer (default: the endpoint's limit)"
    )


def _at_least_one(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def run(options: argparse.Namespace) -> int:
    """Talks until the input ends. Exit code: 2 where questions from a file or a pipe found no answer."""
    reference = options.model or options.folder
    if (options.url is None) == (reference is None):
        raise ServingError("say which model to ask", "give either --url URL or --model FOLDER")
    picture = read_picture(options.image) if options.image else None
    if options.url is not None:
        ask = remote_asker(options.url, options.max_tokens)
    else:
        ask = local_asker(reference, options.tracking_uri, options.max_tokens)
    errors = talk(ask, picture)
    return _FAILED if errors and not sys.stdin.isatty() else 0


def talk(ask: Ask, picture: bytes | None) -> int:
    """The dialogue: reads lines from stdin, writes answers to stdout as they come.

    Returns:
        How many lines ended in an error.
    """
    messages: list[dict[str, Any]] = []
    errors = 0
    while (line := _read_line()) is not None:
        try:
            if line == "/quit":
                break
            if line.startswith("/image "):
                picture = read_picture(Path(line.removeprefix("/image ").strip()).expanduser())
                messages = []
            elif line == "/new":
                messages = []
            elif line:
                messages = _turn(ask, messages, line, picture)
        except RayvaError as error:
            errors += 1
            print(f"error: {error}", file=sys.stderr)
    return errors


def _turn(
    ask: Ask, messages: list[dict[str, Any]], question: str, picture: bytes | None
) -> list[dict[str, Any]]:
    """Asks one question; the picture goes with the first. Returns the conversation with the answer."""
    shown = [picture] if picture is not None and not messages else []
    asked = [*messages, user_message(question, shown)]
    answer = ""
    try:
        for piece in ask(asked):
            print(piece, end="", flush=True)
            answer += piece
    except RayvaError:
        if answer:
            print(flush=True)  # the error stands on a line of its own
        raise
    print(flush=True)
    return [*asked, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next line; None at the end.

    Raises:
        DataError: it is no text.
    """
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # in some locales Python lets wrong bytes pass as half surrogate pairs
    except EOFError:
        return None
    except UnicodeError as error:
        raise DataError(
            "A line of the input is not text in UTF-8", "convert it with iconv -t UTF-8"
        ) from error
    return line


def remote_asker(url: str, max_tokens: int | None) -> Ask:
    """Asks the first model that the endpoint serves."""
    client = ChatClient(url)
    names = client.models()
    if not names:
        raise ServingError(f"{url} serves no model")
    return lambda messages: client.stream(names[0], messages, max_tokens)


def local_asker(reference: str, tracking_uri: str | None, max_tokens: int | None) -> Ask:
    """Loads the model here and asks it, through the same checks as a served one's."""
    from rayva.model.folder import load_assistant
    from rayva.serving.engine import BuiltinEngine
    from rayva.serving.errors import ApiError
    from rayva.serving.media import load_images
    from rayva.serving.schema import parse_chat
    from rayva.serving.source import find_model, local_folder

    folder, storage = local_folder(find_model(reference, tracking_uri))
    engine = BuiltinEngine(load_assistant(folder))
    limits = Serving(max_image_bytes=_LARGEST_PICTURE)
    if max_tokens is not None:
        limits = limits.model_copy(update={"max_new_tokens": max_tokens})

    def ask(messages: list[dict[str, Any]]) -> Iterator[str]:
        try:
            _, chat = parse_chat({"model": storage.root, "messages": messages}, limits)
            images = load_images(chat.image_uris, limits)
            for piece in _in_this_thread(engine.generate(chat.messages, images, chat.sampling)):
                yield piece.text
        except ApiError as error:
            raise ServingError(error.message) from error

    return ask


def _in_this_thread(pieces: AsyncIterator[Any]) -> Iterator[Any]:
    """An async iterator's items, for code that is not async."""
    with asyncio.Runner() as runner:
        iterator = aiter(pieces)
        while True:
            try:
                yield runner.run(_next(iterator))
            except StopAsyncIteration:
                return


async def _next(iterator: AsyncIterator[Any]) -> Any:
    return await anext(iterator)
