"""Image processors of Hugging Face's LLaVA that pad to a square, in every way that they name their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from rayva.model.export_hf import _image_processor
from rayva.model.import_vision import check_vision, tower_of_folder, wants_padding, write_vision
from tests.export.tiny_model import SIDE
from tests.interop.checkpoints import make_clip

SQUARE = {"height": SIDE, "width": SIDE}


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        {"size": SQUARE, "crop_size": SQUARE},
        {"size": {"shortest_edge": SIDE + 8}, "crop_size": SQUARE},
        {"size": SQUARE, "do_center_crop": False},
    ],
)
def test_pixels_are_those_of_the_checkpoints_processor(sizes: dict[str, Any], tmp_path: Path) -> None:
    make_clip(tmp_path / "tower")
    theirs = LlavaImageProcessorPil(do_pad=True, **sizes)
    theirs.save_pretrained(tmp_path / "tower")
    part = tower_of_folder(tmp_path / "tower", None)
    assert wants_padding(part.processor)
    (tmp_path / "vision").mkdir()
    preprocessing = write_vision(check_vision(part), tmp_path / "vision", -2, "pad").spec.preprocessing
    draw = np.random.default_rng(7)
    for height, width in ((28, 28), (33, 61), (80, 45)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = preprocessing.normalize(torch.from_numpy(preprocessing.to_uint8([image])))
        for processor in (theirs, _image_processor(tmp_path / "vision", preprocessing)):
            assert torch.equal(found, processor(images=image, return_tensors="pt")["pixel_values"])
