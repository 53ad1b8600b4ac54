"""Preprocessing is bit-equal to Hugging Face's image processors, and bounded in memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rayva.errors import WeightsError
from rayva.vision.preprocess import Preprocessing, from_hf

CLIP = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
SIGLIP = SiglipImageProcessorPil(size={"height": 32, "width": 32})
sides = st.integers(1, 150)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    return preprocessing.normalize(torch.from_numpy(preprocessing.to_uint8([image])))


def theirs(processor: Any, image: Image.Image) -> torch.Tensor:
    return torch.as_tensor(np.stack(processor(image)["pixel_values"]))


def padded(image: Image.Image, processor: Any) -> Image.Image:
    """LLaVA-1.5's padding: to a square, with the processor's mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * v) for v in processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@settings(max_examples=60, deadline=None)
@given(width=sides, height=sides, seed=st.integers(0, 9))
def test_equals_the_processors_bit_for_bit(width: int, height: int, seed: int) -> None:
    assume(max(width, height) < 16 * min(width, height))  # longer ones have tests of their own
    image = noise(width, height, seed)
    square = from_hf(CLIP.to_dict(), None, "square", "CLIP")
    assert torch.equal(ours(square, image), theirs(CLIP, image))
    stretched = from_hf(SIGLIP.to_dict(), None, "square", "SigLIP")
    assert torch.equal(ours(stretched, image), theirs(SIGLIP, image))
    pad = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert torch.equal(
        ours(from_hf(pad.to_dict(), None, "pad", "CLIP"), image), theirs(pad, padded(image, pad))
    )


def test_image_size_overrides_the_processors_own() -> None:
    image = noise(100, 70)
    larger = CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    assert torch.equal(
        ours(from_hf(CLIP.to_dict(), 64, "square", "CLIP"), image), theirs(larger, image)
    )  # the margin around the crop grows along


def test_old_configurations_with_plain_numbers_are_read() -> None:
    old = {
        "size": 224,
        "crop_size": 224,
        "do_center_crop": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    preprocessing = from_hf(old, None, "square", "old")
    assert (preprocessing.resize_to, preprocessing.image_size, preprocessing.stretch) == (224, 224, False)


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_elongated_images_keep_their_middle_and_little_memory(aspect: Any) -> None:
    ramp = np.linspace(0, 255, 60_000).astype(np.uint8)
    strip = Image.fromarray(np.stack([ramp] * 3, axis=-1)[None].repeat(2, axis=0))  # 60,000 x 2
    preprocessing = from_hf(CLIP.to_dict(), None, aspect, "CLIP")
    tracemalloc.start()
    pixels = preprocessing.to_uint8([strip])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    assert pixels.shape == (1, 32, 32, 3)
    assert abs(int(pixels[0, 16, 16, 0]) - 127) <= 6


def test_elongated_images_differ_from_the_processors_by_rounding_only() -> None:
    image = noise(20 * 48, 48)
    mine = from_hf(CLIP.to_dict(), None, "square", "CLIP")
    difference = (ours(mine, image) - theirs(CLIP, image)).abs().max()
    assert difference < 3 * (1 / 255) / min(mine.std)


@pytest.mark.parametrize(
    "change",
    [{"do_normalize": False}, {"size": {"longest_edge": 9}}, {"crop_size": {"height": 99, "width": 99}},
     {"image_mean": [0.5]}, {"size": {"height": 9, "width": 8}}],
)  # fmt: skip
def test_unsupported_processors_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="somewhere"):
        from_hf({**CLIP.to_dict(), **change}, None, "square", "somewhere")
