"""Visual features that are encoded in the training worker, without a store."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch
from PIL.Image import Image
from torch import Tensor

from rayva.errors import DataError
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes
from rayva.vision.towers import VisionTower


class InlineFeatures:
    """Reads, decodes and encodes images when a batch needs them; the same numbers as the store's, in fp16.

    `images` is a table of `rayva.data.schema.IMAGES`.
    """

    encodes = True

    def __init__(
        self, images: pa.Table, tower: VisionTower, max_pixels: int, max_bytes: int, batch_size: int = 64
    ) -> None:
        self.num_tokens = tower.num_tokens
        self._tower, self._max_pixels, self._max_bytes = tower, max_pixels, max_bytes
        self._batch_size = batch_size
        self._uris, self._contents = images["uri"], images["content"]
        self._rows = {image_id: row for row, image_id in enumerate(images["image_id"].to_pylist())}

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        """Features [N, D] of each image; `DataError` where one has become unreadable since it was checked.

        At most `batch_size` decoded pictures are in memory at once: those of a step may be large.
        """
        distinct = list(dict.fromkeys(image_ids))
        by_id: dict[str, Tensor] = {}
        for start in range(0, len(distinct), self._batch_size):
            ids = distinct[start : start + self._batch_size]
            pixels = self._tower.preprocess([self._decode(image_id) for image_id in ids])
            features_BND = self._tower.encode(pixels).to("cpu", torch.float16)
            by_id |= zip(ids, features_BND, strict=True)
        return [by_id[image_id] for image_id in image_ids]

    def _decode(self, image_id: str) -> Image:
        row = self._rows[image_id]
        content, uri = self._contents[row].as_py(), self._uris[row].as_py()
        try:
            data = content if content is not None else read_image_bytes(uri, self._max_bytes)
            return decode_image(data, self._max_pixels, self._max_bytes)
        except BadImage as error:
            raise DataError(
                f"The image {image_id} ({uri or 'in the table'}) cannot be used any more: {error}",
                "Restore it, or run the features step again with --force features.",
            ) from error
