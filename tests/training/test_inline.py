"""Features encoded in the worker are those that the tower gives, in the store's precision."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import torch
from PIL import Image

from rayva.data.schema import IMAGES
from rayva.errors import DataError
from rayva.training.inline import InlineFeatures
from rayva.vision.towers import VisionTower, load_tower
from tests.export.tiny_model import make_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> VisionTower:
    folder = tmp_path_factory.mktemp("tower")
    make_tower(folder)
    return load_tower(str(folder), "clip", -2)


def _png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "png")
    return buffer.getvalue()


def _inline(tower: VisionTower, rows: list[dict[str, object]]) -> InlineFeatures:
    return InlineFeatures(pa.Table.from_pylist(rows, schema=IMAGES), tower, 10**6, 10**6)


def test_images_from_the_table_and_from_files(tower: VisionTower, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(_png("blue"))
    inline = _inline(
        tower,
        [
            {"image_id": "red", "split": "train", "content": _png("red")},
            {"image_id": "blue", "split": "train", "uri": str(tmp_path / "blue.png")},
        ],
    )
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("blue", "red")]
    blue, red = tower.encode(tower.preprocess(pictures)).half()
    found = inline.read(["red", "blue", "red"])
    assert [feature.dtype for feature in found] == [torch.float16] * 3
    for feature, expected in zip(found, (red, blue, red), strict=True):
        torch.testing.assert_close(feature, expected, atol=2e-3, rtol=2e-3)
    assert inline.read([]) == []


def test_no_more_pictures_are_decoded_at_once_than_are_encoded(tower: VisionTower) -> None:
    rows = [
        {"image_id": colour, "split": "train", "content": _png(colour)}
        for colour in ("red", "blue", "green", "black", "white")
    ]
    ids = [str(row["image_id"]) for row in rows]
    seen: list[int] = []

    class Counting:
        num_tokens = tower.num_tokens
        encode = staticmethod(tower.encode)

        @staticmethod
        def preprocess(images: list[Image.Image]) -> torch.Tensor:
            seen.append(len(images))
            return tower.preprocess(images)

    few = InlineFeatures(
        pa.Table.from_pylist(rows, schema=IMAGES), cast(VisionTower, Counting()), 10**6, 10**6, 2
    )
    found = few.read(ids)
    assert seen == [2, 2, 1]
    for feature, expected in zip(found, _inline(tower, rows).read(ids), strict=True):
        torch.testing.assert_close(feature, expected, atol=2e-3, rtol=2e-3)


def test_an_image_that_has_become_unreadable_is_named(tower: VisionTower, tmp_path: Path) -> None:
    inline = _inline(tower, [{"image_id": "gone", "split": "train", "uri": str(tmp_path / "gone.png")}])
    with pytest.raises(DataError, match=r"gone.*gone\.png"):
        inline.read(["gone"])
