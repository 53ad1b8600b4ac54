"""Parquet tables of the record types: streamed in both directions, so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rayva.data.schema import (
    IMAGES,
    QUESTIONS,
    REJECTED,
    SAMPLES,
    ImageRecord,
    Instance,
    Question,
    Rejected,
    Sample,
    Turn,
)
from rayva.errors import StorageError
from rayva.storage import Storage

Record = TypeVar("Record", ImageRecord, Sample, Question, Rejected)

_SCHEMAS: dict[type, pa.Schema] = {
    ImageRecord: IMAGES,
    Sample: SAMPLES,
    Question: QUESTIONS,
    Rejected: REJECTED,
}
_BATCH_ROWS = 4096
_BATCH_BYTES = 32 * 1024 * 1024
"""A row group closes at this size: Arrow's 32-bit offsets and the reader's memory both ask for it."""


def write_records(storage: Storage, rel: str, kind: type[Record], records: Iterable[Record]) -> int:
    """Writes `records` as the Parquet file `rel`; returns how many there were (none is fine).

    Where `records` fails, no file is left: it would look like a whole table.
    """
    schema = _SCHEMAS[kind]
    total = 0
    try:
        with storage.open(rel, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for rows in _batches(records):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                total += len(rows)
    except BaseException:
        storage.delete(rel)
        raise
    return total


def read_records(storage: Storage, rel: str, kind: type[Record]) -> Iterator[Record]:
    """Reads the records of the Parquet file `rel` in their order.

    Raises:
        StorageError: the file is missing, damaged, or another kind of table.
    """
    try:
        with storage.open(rel, "rb") as file, pq.ParquetFile(file) as table:
            if not _is_table_of(kind, table.schema_arrow.names):
                raise StorageError(
                    f"{storage.uri(rel)} is no table of {kind.__name__} records",
                    "run the data step again with an empty folder",
                )
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield _from_row(kind, row)
    except FileNotFoundError as error:
        raise StorageError(f"There is no {storage.uri(rel)}.", "run the data step first") from error
    except pa.ArrowInvalid as error:
        raise StorageError(
            f"{storage.uri(rel)} is damaged: {error}.", "delete its folder and run the data step again"
        ) from error


def _is_table_of(kind: type, names: list[str]) -> bool:
    """Whether a table has the columns of `kind`; the last ones may be missing where there is a default."""
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    wanted: list[str] = _SCHEMAS[kind].names
    return names == wanted[: len(names)] and set(needed) <= set(names)


def count_records(storage: Storage, rel: str) -> int:
    """Number of rows of the Parquet file `rel`, from its footer."""
    with storage.open(rel, "rb") as file, pq.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def _batches(records: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for record in records:
        rows.append(_to_row(record))
        size += len(getattr(record, "content", None) or b"")
        if len(rows) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _to_row(record: Any) -> dict[str, Any]:
    """Written out, since `dataclasses.asdict` copies deeply and takes most of the time of a large table."""
    row = {name: getattr(record, name) for name in record.__dataclass_fields__}
    if isinstance(record, Sample):
        row["turns"] = [{"role": turn.role, "text": turn.text} for turn in record.turns]
    elif isinstance(record, ImageRecord):
        row["instances"] = [{"category": i.category, "bbox": i.bbox} for i in record.instances]
    return row


def _from_row(kind: type[Record], row: dict[str, Any]) -> Record:
    if kind is ImageRecord:
        row["captions"] = tuple(row["captions"])
        row["instances"] = tuple(Instance(i["category"], tuple(i["bbox"])) for i in row["instances"])
    elif kind is Sample:
        row["image_ids"] = tuple(row["image_ids"])
        row["turns"] = tuple(Turn(t["role"], t["text"]) for t in row["turns"])
    elif kind is Question:
        row["accepted"] = tuple(row["accepted"])
    return kind(**row)
