"""Shards: immutable Arrow IPC files of features, each with an index part that says where its rows lie.

A shard belongs to the store from the moment that its index part appears, which is written last. Both
appear whole or not at all, and are named by the shard's content: writing one twice (a retried task)
changes nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayva.errors import StorageError, WeightsError
from rayva.storage import Storage, storage_errors

SHARDS = "shards"
INDEX = "index"
SHA256 = b"sha256"
"""Key in an index part's schema metadata: the digest of the whole shard."""

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),  # number of the record batch
        ("offset", pa.int64()),  # byte of the shard where the N x D float16 values start
    ]
)


def shard_schema(num_tokens: int, hidden_size: int) -> pa.Schema:
    """One image a row: its key, and its features as float16 [N, D]."""
    feature = pa.fixed_shape_tensor(pa.float16(), (num_tokens, hidden_size))
    return pa.schema([pa.field("key", pa.string(), False), pa.field("feature", feature, False)])


def to_float16(features_BND: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Rounds features to float16.

    Raises:
        WeightsError: where a value is not finite or beyond float16's range.
    """
    with np.errstate(over="ignore"):
        half_BND = features_BND.astype(np.float16)
    finite_B = np.isfinite(half_BND).all(axis=(1, 2))
    if not finite_B.all():
        worst = int(np.argmin(finite_B))
        largest = float(np.abs(features_BND[worst]).max())
        raise WeightsError(
            f"The features of image {keys[worst]} reach {largest:.6g}; float16 ends at 65504.",
            "choose another vision.layer, or set features.mode=inline, which stores nothing",
        )
    return half_BND


class ShardWriter:
    """Writes features to shards of `shard_rows` rows, row by row: nothing piles up in memory.

    A context manager: leaving it without an error completes the last shard, as `close` does.
    """

    def __init__(
        self, storage: Storage, rel: str, num_tokens: int, hidden_size: int, shard_rows: int
    ) -> None:
        self._storage, self._rel = storage, rel
        self._shape = (num_tokens, hidden_size)
        self._shard_rows = shard_rows
        self._open: _OpenShard | None = None

    def write(self, keys: Sequence[str], features_BND: np.ndarray) -> None:
        """Appends rows; `features_BND` is float16 [B, N, D]."""
        if features_BND.dtype != np.float16 or features_BND.shape[1:] != self._shape:
            raise ValueError(
                f"features are {features_BND.dtype} {features_BND.shape}, the store's float16 {self._shape}"
            )
        for key, feature_ND in zip(keys, features_BND, strict=True):
            if self._open is None:
                self._open = _OpenShard(self._storage, self._rel, shard_schema(*self._shape))
            self._open.append(key, feature_ND)
            if self._open.rows == self._shard_rows:
                self.close()

    def close(self) -> None:
        """Completes the shard under way, if there is one."""
        if self._open is not None:
            shard, self._open = self._open, None
            shard.commit()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._open is not None:
            self._open.abandon()


class _OpenShard:
    """A shard under its temporary name: beside its final place, or on the local disk for remote storage."""

    def __init__(self, storage: Storage, rel: str, schema: pa.Schema) -> None:
        self._storage, self._rel, self._schema = storage, rel, schema
        if storage.is_local:
            storage.makedirs(f"{rel}/{SHARDS}")
        folder = storage.path(rel, SHARDS) if storage.is_local else tempfile.gettempdir()
        self._path = Path(folder) / _temporary_name()
        with storage_errors(str(self._path)):
            self._stream = open(self._path, "wb")  # noqa: SIM115 - closed by commit or abandon
        self._writer = pa.ipc.new_file(self._stream, schema)
        self.rows = 0

    def append(self, key: str, feature_ND: np.ndarray) -> None:
        values = np.ascontiguousarray(feature_ND)
        flat = pa.Array.from_buffers(pa.float16(), values.size, [None, pa.py_buffer(values)])
        cell = pa.FixedSizeListArray.from_arrays(flat, values.size)
        feature = pa.ExtensionArray.from_storage(self._schema.field("feature").type, cell)
        row = pa.RecordBatch.from_arrays([pa.array([key], pa.string()), feature], schema=self._schema)
        with storage_errors(str(self._path)):
            self._writer.write_batch(row)
        self.rows += 1

    def commit(self) -> None:
        with storage_errors(str(self._path)):
            self._writer.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            with open(self._path, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            name = f"{sha256[:32]}.arrow"
            part = index_part(self._path, name, sha256)
            if self._storage.is_local:
                os.replace(self._path, self._storage.path(self._rel, SHARDS, name))
            else:
                self._storage.upload(self._path, f"{self._rel}/{SHARDS}/{name}")
                self._path.unlink()
        write_index_part(self._storage, self._rel, name, part)

    def abandon(self) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)


def index_part(path: Path, name: str, sha256: str) -> pa.Table:
    """The index of the complete shard at `path`, which the store will know as `name`."""
    keys: list[str] = []
    offsets: list[int] = []
    with pa.memory_map(os.fspath(path)) as source:
        base = source.read_buffer().address
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            row = reader.get_batch(number)
            keys.append(row.column("key")[0].as_py())
            offsets.append(row.column("feature").storage.values.buffers()[1].address - base)
    columns = [keys, [name] * len(keys), list(range(len(keys))), offsets]
    return pa.table(columns, schema=INDEX_SCHEMA).replace_schema_metadata({SHA256: sha256})


def write_index_part(storage: Storage, rel: str, name: str, part: pa.Table) -> None:
    """Makes the shard `name` part of the store."""
    sink = io.BytesIO()
    pq.write_table(part, sink)
    storage.write_bytes(f"{rel}/{INDEX}/{Path(name).stem}.parquet", sink.getvalue())


def read_index_part(storage: Storage, rel: str, file: str) -> pa.Table:
    """One index part, with the shard's sha256 in its schema metadata.

    Raises:
        StorageError: where the file is damaged.
    """
    path = f"{rel}/{INDEX}/{file}"
    try:
        part = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
        if not part.schema.equals(INDEX_SCHEMA) or SHA256 not in (part.schema.metadata or {}):
            raise pa.ArrowInvalid("it is not an index part")
    except (pa.ArrowInvalid, OSError) as error:  # a damaged page is an OSError
        raise StorageError(
            f"{storage.uri(path)} cannot be read: {error}",
            "delete the file and run the features step again; it rebuilds the index from the shard",
        ) from error
    return part


def recover(storage: Storage, rel: str) -> int:
    """Takes in complete shards whose index part was never written, and removes what dead writers left.

    Returns the number of shards taken in. Safe beside other writers: it writes what they would.
    """
    indexed = {Path(file).stem for file in storage.list(f"{rel}/{INDEX}")}
    taken = 0
    for name in storage.list(f"{rel}/{SHARDS}"):
        if _is_left_by_the_dead(name):
            storage.delete(f"{rel}/{SHARDS}/{name}")
        elif name.endswith(".arrow") and Path(name).stem not in indexed:
            local = storage.localize(f"{rel}/{SHARDS}/{name}")
            with open(local, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if sha256[:32] == Path(name).stem:
                write_index_part(storage, rel, name, index_part(local, name, sha256))
                taken += 1
    return taken


_TEMPORARY = re.compile(r"\.tmp~(?P<host>.*)~(?P<pid>\d+)~[0-9a-f]+\.arrow")


def _temporary_name() -> str:
    return f".tmp~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}.arrow"


def _is_left_by_the_dead(name: str) -> bool:
    match = _TEMPORARY.fullmatch(name)
    if match is None or match["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(match["pid"]), 0)  # signal 0 only asks whether the process lives
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
