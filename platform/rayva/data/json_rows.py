"""Reads JSON arrays and JSON Lines row by row, so that a file of a gigabyte needs little memory."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayva.data.locations import open_input, split_chain
from rayva.errors import DataError

_CHUNK = 1 << 20
_LINES = (".jsonl", ".ndjson")
_TAIL = 16
"""A syntax error this near to the end of the buffer may only mean that more text must be read."""


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row: its index in the file and its value; `error` is set where a line is not JSON."""

    index: int
    value: Any
    error: str = ""


def read_json_rows(uri: str, setting: str) -> Iterator[JsonRow]:
    """Yields the rows of a JSON array, or the lines of a JSON Lines file.

    A line that is not JSON becomes a row with `error` set, except the first: then the file is
    something else altogether.

    Raises:
        DataError: the file is missing, not UTF-8, or not JSON; says the line and column.
    """
    with open_input(uri, setting) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        try:
            reader = _ArrayReader(text, uri)
            if split_chain(uri)[0].removesuffix(".gz").endswith(_LINES) or reader.first() == "{":
                yield from _read_lines(reader.rest(), uri)
            else:
                yield from reader.rows()
        except UnicodeDecodeError as error:
            raise DataError(f"{uri} is not UTF-8 text: {error}", "save it as UTF-8 JSON") from error
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{uri} cannot be read to its end: {error}", "copy the file again") from error


def _read_lines(lines: Iterator[str], uri: str) -> Iterator[JsonRow]:
    first = True
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:
            column = error.colno if isinstance(error, json.JSONDecodeError) else 1
            if first:
                raise _not_json(uri, index + 1, column, _message(error)) from error
            yield JsonRow(index, None, f"line {index + 1}, column {column}: {_message(error)}")
        else:
            yield JsonRow(index, value)
        first = False


class _ArrayReader:
    """An incremental reader of one JSON array, which keeps one chunk and the current row in memory."""

    def __init__(self, file: io.TextIOWrapper, name: str) -> None:
        self._file, self._name = file, name
        self._decode = json.JSONDecoder().raw_decode
        self._buffer, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the buffer's first character

    def first(self) -> str:
        """The first character that is not white space; empty where there is none."""
        self._skip_space()
        return self._buffer[self._at : self._at + 1]

    def rest(self) -> Iterator[str]:
        """All lines, those already looked at included."""
        while "\n" not in self._buffer and not self._ended:
            self._refill()
        yield from io.StringIO(self._buffer + (self._file.readline() if not self._ended else ""))
        yield from self._file

    def rows(self) -> Iterator[JsonRow]:
        """The elements of the array."""
        self._expect("[", "a JSON array of rows must begin with '['")
        if self.first() == "]":
            self._at += 1
        else:
            index = 0
            while True:
                yield JsonRow(index, self._value())
                index += 1
                if self.first() == "]":
                    self._at += 1
                    break
                self._expect(",", "expecting ',' or ']' after a row")
        if self.first():
            raise self._error(self._at, "there is text behind the end of the array")

    def _expect(self, character: str, message: str) -> None:
        if self.first() != character:
            raise self._error(self._at, message)
        self._at += 1

    def _value(self) -> Any:
        self._skip_space()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
                # A number at the end of the buffer may go on in the next chunk: 1|2, 1.|5, 1e+|5.
                if end + 3 <= len(self._buffer) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _TAIL
                if self._ended or not cut:
                    raise self._error(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._error(self._at, _message(error)) from error
            self._refill()

    def _skip_space(self) -> None:
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer) or self._ended:
                return
            self._refill()

    def _refill(self) -> None:
        """Drops what is done and reads at least as much again as is left (so the cost stays linear)."""
        self._line, self._column = self._position(self._at)
        left = self._buffer[self._at :]
        chunk = self._file.read(max(_CHUNK, len(left)))
        self._buffer, self._at, self._ended = left + chunk, 0, not chunk

    def _position(self, offset: int) -> tuple[int, int]:
        lines = self._buffer.count("\n", 0, offset)
        if not lines:
            return self._line, self._column + offset
        return self._line + lines, offset - self._buffer.rfind("\n", 0, offset)

    def _error(self, offset: int, message: str) -> DataError:
        return _not_json(self._name, *self._position(offset), message)


def _message(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _not_json(name: str, line: int, column: int, message: str) -> DataError:
    return DataError(
        f"{name} is not JSON: line {line}, column {column}: {message}",
        "give a JSON array of rows, or JSON Lines with one row a line",
    )
