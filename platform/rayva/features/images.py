"""Reads images from the data step's table: their bytes, their keys, their pixels, row by row.

A row's failure is a value (`Failure`), not an exception: one bad image never stops a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq
from PIL import Image

from rayva.errors import StorageError
from rayva.storage import Storage
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes

_READERS = 8
"""Files read ahead at a time: object stores answer slowly, but many requests at once."""


@dataclass(frozen=True)
class Failure:
    """Why an image cannot be used; see `BadImage`."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Limits:
    """Larger images are refused, before they are decoded."""

    max_pixels: int
    max_bytes: int


@dataclass(frozen=True)
class ImageRow:
    """One row: its id, and its bytes or why there are none."""

    image_id: str
    content: bytes | Failure

    @property
    def key(self) -> str | Failure:
        """sha256 (hex) of the bytes: what the feature store calls this image."""
        return hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else self.content

    def decode(self, limits: Limits) -> Image.Image | Failure:
        """The picture, RGB and upright."""
        if isinstance(self.content, Failure):
            return self.content
        try:
            return decode_image(self.content, limits.max_pixels, limits.max_bytes)
        except BadImage as error:
            return Failure(error.reason, error.detail)


@dataclass(frozen=True)
class ImageTable:
    """The table images.parquet at `rel` (schema IMAGES), read in pieces anywhere on the cluster."""

    storage: Storage
    rel: str
    limits: Limits

    def row_groups(self) -> list[int]:
        """Number of rows of each row group."""
        try:
            with self.storage.open(self.rel) as file, pq.ParquetFile(file) as table:
                metadata = table.metadata
                return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except FileNotFoundError as error:
            path = self.storage.uri(self.rel)
            raise StorageError(f"There is no {path}.", "run the data step first") from error

    def read(self, row_group: int, rows: Sequence[int]) -> Iterator[ImageRow]:
        """These rows of one row group, in this order."""
        with self.storage.open(self.rel) as file, pq.ParquetFile(file) as table:
            group = table.read_row_group(row_group, columns=["image_id", "uri", "content"]).take(rows)
        columns = [group.column(name) for name in ("image_id", "uri", "content")]
        cells = ([column[i].as_py() for column in columns] for i in range(len(rows)))
        if columns[1].null_count == len(rows):
            yield from (self._row(*row) for row in cells)
            return
        with ThreadPoolExecutor(_READERS) as readers:
            yield from readers.map(lambda row: self._row(*row), cells)

    def _row(self, image_id: str, uri: str | None, content: bytes | None) -> ImageRow:
        try:
            if content is None:
                if uri is None:
                    raise BadImage("missing", "the row has neither bytes nor a file name")
                content = read_image_bytes(uri, self.limits.max_bytes)
            elif len(content) > self.limits.max_bytes:
                limit = self.limits.max_bytes
                raise BadImage("too_many_bytes", f"{len(content):,} bytes, the limit is {limit:,}")
        except BadImage as error:
            return ImageRow(image_id, Failure(error.reason, error.detail))
        return ImageRow(image_id, content)
