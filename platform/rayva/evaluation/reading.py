"""Reads files of answers, questions and reviews: whole or not at all, with the reason.

A figure made from a part of a file would be wrong without anyone seeing it. So a file that is empty, cut,
or mixed with another kind of record is refused, with its line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from rayva.data.locations import open_input
from rayva.errors import DataError

_EXCERPT = 60


def read_text(path: str, what: str) -> str:
    """The text of a file; `what` names the argument that gave it.

    Raises:
        DataError: it is missing, empty, no UTF-8, or ends within its compression.
    """
    try:
        with open_input(path, what) as file:
            text = file.read().decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", f"check the file given as {what}") from error
    if not text.strip():
        raise DataError(f"{path} is empty", f"give a file with content as {what}")
    return text


def read_document(path: str, what: str) -> Any:
    """A file that is one JSON value.

    Raises:
        DataError: it cannot be read, or is not JSON; says where.
    """
    return _load(read_text(path, what), path, 0)


def read_rows(path: str, what: str) -> list[Any]:
    """Rows of a JSON Lines file or of a JSON array; an object that is a whole document is one row.

    Raises:
        DataError: it cannot be read, or a row is not JSON; says the line.
    """
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        rows = _load(text, path, 0)
    elif _is_lines(text):
        lines = text.split("\n")
        rows = [_load(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        rows = [_load(text, path, 0)]
    if not rows:
        raise DataError(f"{path} has no rows", f"give a file with content as {what}")
    return list(rows)


def _is_lines(text: str) -> bool:
    """Whether the first line is a JSON value of its own."""
    first, _, rest = text.strip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # A cut line looks the same: it is a line if the next one begins an object too.
        return rest.lstrip(" \t\r").startswith("{")
    return True


def _load(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply", "give the file as it was written") from error
    except ValueError as error:
        place = f"line {line}"
        if isinstance(error, json.JSONDecodeError):
            place = f"line {line or error.lineno}, column {error.colno}"
        raise DataError(
            f"{path} is not whole JSON: {place}: {error}", "the file may be cut; copy or write it again"
        ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def as_object(value: object, where: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; else `DataError`."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {shown(value)}", "check that the file is whole")
    return value


def as_text(value: object, where: str) -> str:
    """`value`, if it is text; else `DataError`."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, found {shown(value)}", "check that the file is whole")
    return value


def as_id(value: object, where: str) -> str:
    """An id, which files write as text or as a whole number, as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: expected an id, found {shown(value)}", "check that the file is whole")
    return str(value)


def as_integer(value: object, where: str) -> int:
    """`value`, if it is a whole number; else `DataError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: expected a whole number, found {shown(value)}", "check the file")
    return value


def as_number(value: object, where: str) -> float:
    """`value`, if it is a finite number; else `DataError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: expected a number, found {shown(value)}", "check the file")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{where}: {shown(value)} is no finite number", "check the file")
    return number


def shown(value: object) -> str:
    """A short excerpt of a value, for messages."""
    text = repr(value)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def unique(pairs: Iterable[tuple[str, Any]], path: str) -> dict[str, Any]:
    """Pairs by id.

    Raises:
        DataError: an id occurs twice: two files put together, or one that was written to twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(
                f"{path} has {shown(key)} more than once", "give one answer a question: one file, one run"
            )
        found[key] = value
    return found
