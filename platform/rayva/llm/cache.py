"""Every answer is kept before it counts, so that none is ever paid for twice.

Answers are lines of JSON in files under one folder of the storage. On a local disk each process appends to
a file of its own and forces it to the disk; on an object store, where nothing can be appended to, each group
of answers becomes an object. A line that a kill has cut is left out when the files are read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rayva.errors import StorageError
from rayva.llm.request import MOST_TOKENS, ChatAnswer, ChatRequest, estimated_tokens
from rayva.storage import Storage, storage_errors

_LOG = logging.getLogger(__name__)
_ROW_START = b'{"digest": '
"""How a row begins. Inside one, in the words of an answer, the quotes would be escaped."""


class AnswerCache:
    """Answers by request digest.

    Opening it reads all answers; `close` merges what an object store holds in many small objects.

    Raises:
        StorageError: a file holds something else than answers.
    """

    def __init__(self, storage: Storage, folder: str = "answers") -> None:
        self._storage, self._folder = storage, folder
        self._answers: dict[str, dict[str, Any]] = {}
        self._lost: list[dict[str, Any]] = []
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._own = _new_name()
        self._descriptor: int | None = None
        self._objects: list[str] = []
        self._written = 0
        storage.makedirs(folder)
        for name in storage.list(folder):
            if name.endswith(".jsonl"):
                self._read(f"{folder}/{name}")

    def __len__(self) -> int:
        return len(self._answers)

    def answers(self) -> Iterator[ChatAnswer]:
        """All that may have been paid for: answers, and those that were lost at their worst case."""
        return (ChatAnswer(**row["answer"]) for row in (*self._answers.values(), *self._lost))

    def lost(self) -> list[tuple[str, ChatAnswer]]:
        """Calls that broke off and may be billed: the request's digest, and the worst case."""
        return [(row["digest"], ChatAnswer(**row["answer"])) for row in self._lost]

    def get(self, request: ChatRequest) -> ChatAnswer | None:
        """The answer to `request`, or None if it has not been asked."""
        row = self._answers.get(request.digest)
        if row is None:
            return None
        answer = {**row["answer"], "cached": True}
        return ChatAnswer(
            **{**answer, "prompt_tokens": answer["prompt_tokens"] or request.estimated_prompt_tokens()}
        )

    async def put(self, request: ChatRequest, answer: ChatAnswer) -> None:
        """Keeps an answer; returns when it is on the storage. Many at once are written together."""
        await self._put(_row(request, answer))

    async def put_lost(self, request: ChatRequest) -> None:
        """Keeps in mind that a call broke off which may have to be paid for: a budget must count it."""
        most = ChatAnswer(
            "", None, request.most_prompt_tokens(), request.sampling.max_tokens, request.model, 0.0
        )
        await self._put({**_row(request, most), "lost": True})

    async def _put(self, row: dict[str, Any]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        await done

    def put_now(self, answers: Iterable[tuple[ChatRequest, ChatAnswer]]) -> None:
        """Keeps answers, where there is no event loop: one write for all of them."""
        rows = [_row(request, answer) for request, answer in answers]
        if rows:
            self._write(_lines(rows))
        self._answers |= {row["digest"]: row for row in rows}

    def _learn(self, row: dict[str, Any]) -> None:
        if row.get("lost"):
            self._lost.append(row)
        else:
            self._answers[row["digest"]] = row

    def close(self) -> None:
        """Ends writing and merges the objects of this process into one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if len(self._objects) > 1:
            merged = b"".join(self._storage.read_bytes(name) for name in self._objects)
            self._storage.write_bytes(self._next_object(), merged)
            for name in self._objects:
                self._storage.delete(name)
        self._objects = []

    async def _write_waiting(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                # In a thread: forcing a file to the disk takes as long as many calls.
                await asyncio.to_thread(self._write, _lines([row for row, _ in group]))
            except (OSError, StorageError) as error:
                for _, done in group:
                    if not done.cancelled():
                        done.set_exception(error)
                continue
            for row, done in group:
                self._learn(row)
                if not done.cancelled():
                    done.set_result(None)

    def _write(self, lines: bytes) -> None:
        if not self._storage.is_local:
            name = self._next_object()
            self._storage.write_bytes(name, lines)
            self._objects.append(name)
            return
        rel = f"{self._folder}/{self._own}.jsonl"
        with storage_errors(self._storage.uri(rel)):
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._descriptor = os.open(self._storage.path(rel), flags, 0o644)
            whole = os.fstat(self._descriptor).st_size
            try:
                view = memoryview(lines)
                while view:
                    view = view[os.write(self._descriptor, view) :]
                os.fdatasync(self._descriptor)
            except OSError:
                self._leave_file(self._descriptor, whole)
                raise

    def _leave_file(self, descriptor: int, size: int) -> None:
        """After a failed write: cuts the file back to `size` bytes, and the next row begins a new one.

        Else that row would be appended to half a line, and could not be read.
        """
        self._descriptor, self._own = None, _new_name()
        try:
            os.ftruncate(descriptor, size)
        except OSError as error:
            # Half a line at the end of a file is left out when it is read.
            _LOG.warning("a file of answers ends in half a line: %s", error)
        finally:
            os.close(descriptor)

    def _next_object(self) -> str:
        self._written += 1
        return f"{self._folder}/{self._own}-{self._written:06d}.jsonl"

    def _read(self, rel: str) -> None:
        lines = self._storage.read_bytes(rel).split(b"\n")
        # After a kill the last line may be cut; whole ones end in a line feed.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                self._learn(_read_row(line))
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"{self._storage.uri(rel)} is damaged in line {number}: {error}.",
                    "remove that line; the call is then made again",
                ) from error


def _new_name() -> str:
    """A file's name, without its ending; later ones come later in the alphabet."""
    return f"{int(time.time() * 1000):013d}-{uuid.uuid4().hex[:8]}"


def _read_row(line: bytes) -> dict[str, Any]:
    """The row of a line, or the whole one at its end, where a write that failed left half a line before it.

    Counts of tokens that cannot be are replaced: those of an answer by an estimate, those of a prompt, which
    is not in the row, by 0.

    Raises:
        ValueError, KeyError, TypeError: it is no answer.
    """
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        start = line.rfind(_ROW_START)
        if start <= 0:
            raise
        row = json.loads(line[start:])
    answer = ChatAnswer(**row["answer"])
    if answer.prompt_tokens > MOST_TOKENS:
        row["answer"]["prompt_tokens"] = 0
    if answer.completion_tokens > MOST_TOKENS:
        row["answer"]["completion_tokens"] = estimated_tokens(answer.text)
    return row


def _row(request: ChatRequest, answer: ChatAnswer) -> dict[str, Any]:
    return {
        "digest": request.digest,
        "prompt_digest": request.prompt_digest,
        "sampling": asdict(request.sampling),
        "attempt": request.attempt,
        "answer": asdict(answer),
    }


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
