"""The feature store: features by the sha256 of the image's bytes.

    <root>/features/<digest>/manifest.json      exactly how the features were made
                             shards/*.arrow     Arrow IPC files, uncompressed, one image a record batch
                             index/*.parquet    key -> shard, row, byte offset; one part a shard

The digest covers the tower (weights, layer, preprocessing) and the precision, so a store holds only
features that are alike, and runs share it. Any Arrow reader opens the shards.

Shape suffixes: N visual tokens, D hidden size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayva.errors import StorageError
from rayva.features.shards import (
    INDEX,
    INDEX_SCHEMA,
    SHA256,
    SHARDS,
    index_part,
    read_index_part,
    recover,
)
from rayva.storage import Storage

FORMAT = 1
MANIFEST = "manifest.json"
_OPEN_SHARDS = 256
_REMEDY = "run the features step again; it encodes only what is missing"


@dataclass(frozen=True)
class StoreLayout:
    """What a store's features are: their shape, and how they are made.

    Attributes:
        tower: the tower's own description (`VisionTower.describe()`).
        compute_dtype: precision that the tower runs in; features are kept as float16.
    """

    num_tokens: int
    hidden_size: int
    tower: Mapping[str, Any]
    compute_dtype: str

    def manifest(self) -> dict[str, Any]:
        """JSON data: contents of manifest.json."""
        return {
            "format": FORMAT,
            "num_tokens": self.num_tokens,
            "hidden_size": self.hidden_size,
            "dtype": "float16",
            "compute_dtype": self.compute_dtype,
            "tower": dict(self.tower),
        }

    @property
    def digest(self) -> str:
        """sha256 of the manifest: equal digests mean equal features."""
        text = json.dumps(self.manifest(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def rel(self) -> str:
        """The store's folder, relative to the storage root."""
        return f"features/{self.digest[:16]}"


def prepare_store(storage: Storage, layout: StoreLayout) -> FeatureStore:
    """Opens the store for `layout`, made where there is none; takes in what an interrupted run left whole."""
    path = f"{layout.rel}/{MANIFEST}"
    if not storage.exists(path):
        storage.write_json(path, layout.manifest())
    recover(storage, layout.rel)
    store = FeatureStore.open(storage, layout.rel)
    if store.manifest != json.loads(json.dumps(layout.manifest())):
        raise StorageError(f"{storage.uri(path)} is not what its folder's name says.", "delete the folder")
    return store


class FeatureStore:
    """Read access to a store. Reading is thread-safe; local shards are memory-mapped."""

    def __init__(self, storage: Storage, rel: str, manifest: dict[str, Any], index: pa.Table) -> None:
        self._storage, self._rel, self.manifest = storage, rel, manifest
        self.num_tokens: int = manifest["num_tokens"]
        self.hidden_size: int = manifest["hidden_size"]
        self._bytes = self.num_tokens * self.hidden_size * 2
        self._index = _Index(index)
        self._map = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, storage: Storage, rel: str) -> FeatureStore:
        """Opens the store in the folder `rel` of `storage`.

        Raises:
            StorageError: where there is none, or where its index is damaged.
        """
        if not storage.exists(f"{rel}/{MANIFEST}"):
            raise StorageError(f"There is no feature store at {storage.uri(rel)}.", "run the features step")
        manifest = storage.read_json(f"{rel}/{MANIFEST}")
        if manifest.get("format") != FORMAT:
            raise StorageError(
                f"The feature store at {storage.uri(rel)} has the format {manifest.get('format')!r}.",
                "delete it and run the features step again",
            )
        parts = [
            read_index_part(storage, rel, file).replace_schema_metadata(None)
            for file in storage.list(f"{rel}/{INDEX}")
            if file.endswith(".parquet") and not file.startswith(".")
        ]
        return cls(storage, rel, manifest, pa.concat_tables([INDEX_SCHEMA.empty_table(), *parts]))

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self._storage, self._rel)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._index.find(key) is not None

    @property
    def keys(self) -> list[str]:
        """All keys, sorted."""
        return self._index.keys()

    def read(self, key: str) -> np.ndarray:
        """Features of one image: read-only float16 [N, D]; from a local store a view of the file.

        Raises:
            KeyError: where the store has no such key.
            StorageError: where its shard is gone, cut short, or cannot be reached.
        """
        place = self._index.find(key)
        if place is None:
            raise KeyError(key)
        shard, offset = place
        if self._storage.is_local:
            mapped = self._map(shard)
            if offset + self._bytes > len(mapped):
                raise self._damaged(shard, "it is cut short")
            # Asking for the whole row at once saves a page fault for every 4 kB of a cold file.
            start = offset - offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, start, offset + self._bytes - start)
            values = np.frombuffer(mapped, np.float16, self._bytes // 2, offset)
        else:
            rel = f"{self._rel}/{SHARDS}/{shard}"
            with self._storage.reaching(rel):
                path = self._storage.path(rel)
                data = self._storage.fs.cat_file(path, start=offset, end=offset + self._bytes)
            if len(data) != self._bytes:
                raise self._damaged(shard, "it is cut short")
            values = np.frombuffer(data, np.float16)
        return values.reshape(self.num_tokens, self.hidden_size)

    def verify(self) -> dict[str, int]:
        """Reads every shard whole and compares it with the index: digest, keys, rows and places.

        Returns the number of shards, rows and distinct keys.

        Raises:
            StorageError: names every damaged shard.
        """
        faults: list[str] = []
        parts = [f for f in self._storage.list(f"{self._rel}/{INDEX}") if f.endswith(".parquet")]
        rows = 0
        for file in parts:
            part = read_index_part(self._storage, self._rel, file)
            rows += part.num_rows
            fault = self._fault(f"{Path(file).stem}.arrow", part)
            if fault:
                faults.append(fault)
        if faults:
            folder = self._storage.uri(self._rel)
            raise StorageError(
                f"{len(faults)} of {len(parts)} shards of {folder} are damaged: {'; '.join(faults)}.",
                f"delete these shards and the files of the same names under {INDEX}/, then {_REMEDY}",
            )
        return {"shards": len(parts), "rows": rows, "keys": len(self)}

    def _fault(self, name: str, part: pa.Table) -> str | None:
        if not self._storage.exists(f"{self._rel}/{SHARDS}/{name}"):
            return f"{name} is missing"
        local = self._storage.localize(f"{self._rel}/{SHARDS}/{name}")
        with open(local, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != part.schema.metadata[SHA256].decode():
            return f"{name} has changed since it was written"
        if not index_part(local, name, sha256).equals(part):
            return f"the index of {name} does not tell what it holds"
        return None

    def _map_shard(self, shard: str) -> mmap.mmap:
        path = self._storage.path(self._rel, SHARDS, shard)
        try:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:  # ValueError: the file is empty
            raise self._damaged(shard, "it is gone or empty") from error

    def _damaged(self, shard: str, why: str) -> StorageError:
        path = self._storage.uri(self._rel, SHARDS, shard)
        part = f"{INDEX}/{os.path.splitext(shard)[0]}.parquet"
        return StorageError(f"The shard {path} is damaged: {why}.", f"delete it and {part}, then {_REMEDY}")


class _Index:
    """Keys to places in about 50 bytes a key: sorted arrays in place of a dict of strings."""

    def __init__(self, table: pa.Table) -> None:
        raw = b"".join(bytes.fromhex(key) for key in table.column("key").to_pylist())
        # A key that two runs encoded at the same time is stored twice; either copy serves.
        self._keys, first = np.unique(np.frombuffer(raw, "S32"), return_index=True)
        shards = table.column("shard").combine_chunks().dictionary_encode()
        self._names: list[str] = shards.dictionary.to_pylist()
        self._shards = shards.indices.to_numpy()[first]
        self._offsets = table.column("offset").to_numpy()[first]

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[str]:
        raw = self._keys.tobytes()
        return [raw[start : start + 32].hex() for start in range(0, len(raw), 32)]

    def find(self, key: str) -> tuple[str, int] | None:
        """(shard, byte offset) of a key; None where it is not there."""
        wanted = np.frombuffer(bytes.fromhex(key), "S32")[0]
        place = int(np.searchsorted(self._keys, wanted))
        if place == len(self._keys) or self._keys[place] != wanted:
            return None
        return self._names[self._shards[place]], int(self._offsets[place])
