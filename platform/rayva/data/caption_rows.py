"""Reads images with captions from a folder, a captions file or a Parquet table, as plain rows."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayva.data.json_rows import read_json_rows
from rayva.data.locations import absolute, is_folder, join, list_folder, open_input, parent, split_chain
from rayva.data.quarantine import BadRow, checked_text
from rayva.errors import DataError

SETTING = "data.captions"
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "uri")
CAPTION_COLUMNS = ("captions", "caption", "text")
ID_COLUMNS = ("image_id", "id")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_CAPTION_FILES = ("captions.jsonl", "captions.csv", "captions.parquet")
_PARQUET_ROWS = 64
"""Rows read at once: they may hold the bytes of large images."""

Value = tuple[int, object, BadRow | None]
"""(index, row, fault): `fault` is set where the row could not even be parsed."""


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One image with its captions; either `image` (its name) or `content` (its bytes) is set."""

    row_id: str | None
    image: str | None
    content: bytes | None
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a source, and the folder that relative image names refer to."""

    images: str
    values: Iterator[Value]


def read_rows(source: str) -> Rows:
    """Finds out what `source` is and reads its rows.

    It may be a .parquet, .jsonl, .json or .csv file, or a folder: with a file called
    captions.{jsonl,csv,parquet}; with images and a NAME.txt beside each (one caption a line); or
    with Parquet files.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    if not is_folder(source, SETTING):
        return Rows(parent(absolute(source)), _read_file(source))
    names = list_folder(source, SETTING)
    for name in _CAPTION_FILES:
        if name in names:
            return Rows(source, _read_file(join(source, name)))
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return Rows(source, _read_text_files(source, names))
    tables = [name for name in names if name.endswith(".parquet")]
    if tables:
        return Rows(source, _read_tables([join(source, name) for name in tables]))
    raise DataError(
        f"{SETTING} = {source} holds neither images nor a captions file nor Parquet tables",
        f"put {', '.join(_CAPTION_FILES[:-1])} or {_CAPTION_FILES[-1]} there, or NAME.txt beside each image",
    )


def parse_row(value: object) -> CaptionRow:
    """Checks one row.

    Raises:
        BadRow: with reason "not_an_object", "no_image", "bad_image_field", "no_caption" or
            "invalid_text".
    """
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"the row is a {type(value).__name__}")
    row_id = _first(value, ID_COLUMNS)
    usable = isinstance(row_id, (str, int)) and not isinstance(row_id, bool) and str(row_id)
    image, content = _parse_image(_first(value, IMAGE_COLUMNS))
    captions = _parse_captions(_first(value, CAPTION_COLUMNS))
    return CaptionRow(checked_text(str(row_id)) if usable else None, image, content, captions)


def _first(row: dict[Any, Any], columns: Sequence[str]) -> object:
    """The first of these columns that has something: in a CSV, a cell with nothing in it is an empty text."""
    return next((row[name] for name in columns if row.get(name) not in (None, "")), None)


def _parse_image(value: object) -> tuple[str | None, bytes | None]:
    if isinstance(value, dict):  # the form of Hugging Face's image tables
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None or value == "":
        raise BadRow("no_image", "the row has no image")
    if isinstance(value, bytes):
        if not value:
            raise BadRow("no_image", "the image has no bytes")
        return None, value
    if not isinstance(value, str):
        raise BadRow("bad_image_field", f"the image is a {type(value).__name__}")
    return checked_text(value), None


def _parse_captions(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(checked_text(text.strip()) for text in texts if isinstance(text, str) and text.strip())
    if not found:
        raise BadRow("no_caption", "the row has no caption")
    return found


def _read_file(uri: str) -> Iterator[Value]:
    name, _ = split_chain(uri)
    if name.endswith(".parquet"):
        return _read_tables([uri])
    if name.endswith(".csv"):
        return _read_csv(uri)
    if name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json")):
        return _read_json(uri)
    raise DataError(
        f"{SETTING} = {uri} is neither an existing folder nor a .parquet, .jsonl, .json or .csv file",
        f"check the path given as {SETTING}",
    )


def _read_json(uri: str) -> Iterator[Value]:
    for row in read_json_rows(uri, SETTING):
        yield row.index, row.value, BadRow("not_json", row.error) if row.error else None


def _read_csv(uri: str) -> Iterator[Value]:
    with open_input(uri, SETTING) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            reader = csv.reader(text, strict=True)
            header = next((row for row in reader if row), [])
            columns = [name.strip() for name in header]
            _check_separator(uri, columns)
            _check_columns(uri, columns)
            for index, (row, fault) in enumerate(_csv_rows(reader, columns, uri)):
                yield index, row, fault
        except UnicodeDecodeError as error:
            raise DataError(f"{uri} is not UTF-8 text: {error}", "save it as UTF-8 CSV") from error
        except csv.Error as error:
            raise DataError(
                f"{uri} is not CSV: line {reader.line_num}: {error}", "check that line"
            ) from error


def _csv_rows(reader: Any, columns: Sequence[str], uri: str) -> Iterator[tuple[object, BadRow | None]]:
    """The rows of a CSV file behind its header. Lines that a wrong quote has spoilt are a fault each.

    Args:
        reader: Python's; it goes on behind lines that it refuses.

    Raises:
        DataError: the file ends within quotes, so that nobody knows which rows are meant.
    """
    while True:
        first = reader.line_num + 1
        fields: list[str] = []
        try:
            fields = next(reader)
            fault = _csv_fault(fields, columns, first) if fields else None
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise DataError(
                    f"{uri} is not CSV: a quote that opens in line {first} is never closed",
                    "close it, or write it twice where it is part of the text",
                ) from error
            fault = BadRow("not_csv", f"line {reader.line_num}: {error}: is there a quote too many?")
        # Lines that one row has taken in were to be rows of their own.
        lines = reader.line_num - first + 1 if fault and fault.reason == "not_csv" else 1
        if fields or fault:
            yield from [(dict(zip(columns, fields, strict=False)), fault)] * lines


def _csv_fault(fields: Sequence[str], columns: Sequence[str], line: int) -> BadRow | None:
    """What is wrong with a row that Python reads without complaint.

    A text may hold line breaks. But where a line in it looks like a row (as many fields, and the image's has
    an ending of images, or that of this row's own image), a quote was left open and has taken that row in.
    """
    if len(fields) > len(columns):
        return BadRow(
            "too_many_fields",
            f"line {line}: {len(fields)} fields for {len(columns)} columns: put text with commas in quotes",
        )
    at = next(number for number, name in enumerate(columns) if name in IMAGE_COLUMNS)
    own = _ending(fields[at]) if at < len(fields) else ""
    for inner in chain.from_iterable(text.splitlines()[1:] for text in fields):
        parts = inner.split(",")
        if len(parts) >= len(columns) and _ending(parts[at]) in (*IMAGE_SUFFIXES, own):
            return BadRow("not_csv", f"line {line}: a quote is left open and takes in {inner[:80]!r}")
    return None


def _ending(name: str) -> str:
    return posixpath.splitext(name.strip())[1].lower()


def _read_tables(uris: Sequence[str]) -> Iterator[Value]:
    index = 0
    for uri in uris:
        try:
            with open_input(uri, SETTING) as file, pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                _check_columns(uri, names)
                wanted = [n for n in names if n in (*IMAGE_COLUMNS, *CAPTION_COLUMNS, *ID_COLUMNS)]
                for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                    for row, fault in _rows_of(batch):
                        yield index, row, fault
                        index += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri} is not a readable Parquet table: {error}", "write it again") from error


def _rows_of(batch: pa.RecordBatch) -> Iterator[tuple[object, BadRow | None]]:
    """The rows of a batch; one that has no Python form (its text is not UTF-8, say) has a fault instead."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = None  # one of them; which, is found below
    if rows is not None:
        yield from ((row, None) for row in rows)
        return
    for start in range(batch.num_rows):
        try:
            (row,) = batch.slice(start, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            yield None, BadRow("invalid_text", f"a value cannot be read: {error}")
        else:
            yield row, None


def _check_separator(uri: str, columns: Sequence[str]) -> None:
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and mark in columns[0]:
            raise DataError(
                f"{uri} has {called} between its columns, not commas: {columns[0][:200]!r}",
                "save it with commas",
            )


def _check_columns(uri: str, names: Sequence[str]) -> None:
    twice = [name for name in (*IMAGE_COLUMNS, *CAPTION_COLUMNS, *ID_COLUMNS) if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{uri} has several columns called {', '.join(twice)}",
            "give each caption of an image a row of its own, or one column with lists (Parquet, JSON Lines)",
        )
    for what, columns in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        if not any(column in names for column in columns):
            raise DataError(
                f"{uri} has no {what} column (it has: {', '.join(map(str, names)) or 'none'})",
                f"call it one of: {', '.join(columns)}",
            )


def _read_text_files(folder: str, names: Sequence[str]) -> Iterator[Value]:
    present = set(names)
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    for index, name in enumerate(images):
        beside = posixpath.splitext(name)[0] + ".txt"
        lines: list[str] = []
        fault = None
        if beside in present:
            with open_input(join(folder, beside), SETTING) as file:
                try:
                    lines = file.read().decode("utf-8-sig").splitlines()
                except UnicodeDecodeError as error:
                    fault = BadRow("invalid_text", f"{beside} is not UTF-8: {error.reason}")
        yield index, {"image": name, "captions": lines}, fault
