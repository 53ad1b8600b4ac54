"""Preprocessing is bit-equal to Hugging Face's image processors, and bounded in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rayva.errors import WeightsError
from rayva.vision import preprocess
from rayva.vision.preprocess import Preprocessing, from_hf

CLIP = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
SIGLIP = SiglipImageProcessorPil(size={"height": 32, "width": 32})
PROCESSORS = {
    "clip": CLIP,
    "clip_224": CLIPImageProcessorPil(),
    "clip_336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "siglip": SIGLIP,
    "siglip_bilinear": SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2),
}
sides = st.integers(1, 150) | st.sampled_from([1, 2, 3, 223, 224, 225, 336, 500])


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


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_equals_the_processors_bit_for_bit(name: str) -> None:
    processor = PROCESSORS[name]
    square = from_hf(processor.to_dict(), None, "square", name)
    pad = from_hf(processor.to_dict(), None, "pad", name)

    @settings(max_examples=8 if name.endswith(("224", "336")) else 30, deadline=None)
    @given(width=sides, height=sides, seed=st.integers(0, 9))
    @example(width=1, height=1, seed=0)
    @example(width=1, height=90, seed=0)
    @example(width=301, height=2, seed=0)
    def check(width: int, height: int, seed: int) -> None:
        image = noise(width, height, seed)
        assert torch.equal(ours(square, image), theirs(processor, image))
        assert torch.equal(ours(pad, image), theirs(processor, padded(image, processor)))

    check()


@pytest.mark.parametrize("size", [(15 * 224, 224), (20 * 48, 48), (48, 20 * 48), (3000, 5), (7, 2000)])
def test_elongated_pictures_are_equal_too(size: tuple[int, int]) -> None:
    image = noise(*size)
    for processor in (CLIP, SIGLIP):
        square = from_hf(processor.to_dict(), None, "square", "x")
        assert torch.equal(ours(square, image), theirs(processor, image))
        pad = from_hf(processor.to_dict(), None, "pad", "x")
        assert torch.equal(ours(pad, image), theirs(processor, padded(image, processor)))


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


VERY_ELONGATED = """
import re, sys
import numpy as np
from PIL import Image
from rayva.vision.preprocess import Preprocessing
def peak_kib():  # not getrusage: that counts what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
ramp = np.linspace(0, 255, 120_000).astype(np.uint8)
strip = Image.fromarray(np.stack([ramp] * 3, axis=-1)[None].repeat(2, axis=0))  # 120,000 x 2
preprocessing = Preprocessing(32, 36, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), aspect=sys.argv[1])
before = peak_kib()
pixels = preprocessing.to_uint8([strip])
print(pixels[0, 16, 16, 0], peak_kib() - before)
"""


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_very_elongated_pictures_keep_their_middle_and_need_little_memory(aspect: str) -> None:
    """Done as the processors do it, this one would take 300 MB (square) or 50 GB (pad)."""
    done = subprocess.run(
        [sys.executable, "-c", VERY_ELONGATED, aspect],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")},
        capture_output=True,
        text=True,
        check=True,
    )
    middle, grown_kib = map(int, done.stdout.split())
    assert abs(middle - 127) <= 6
    assert grown_kib < 60_000


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(20 * 48, 48), (48, 20 * 48)])
def test_the_other_order_differs_by_rounding_only(
    aspect: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    rows = np.stack([ramp] * 3, axis=-1)[None].repeat(min(size), axis=0)
    image = Image.fromarray(rows if size[0] > size[1] else rows.swapaxes(0, 1).copy())
    preprocessing = from_hf(CLIP.to_dict(), None, aspect, "CLIP")
    exact = preprocessing.to_uint8([image]).astype(int)
    monkeypatch.setattr(preprocess, "_MOST_PIXELS", 1)
    middle = slice(12, 20) if aspect == "pad" else slice(None)
    difference = np.abs(preprocessing.to_uint8([image]).astype(int) - exact)[0]
    assert difference[middle, middle].mean() <= 1
    assert aspect == "pad" or difference.max() <= 2


@pytest.mark.parametrize(
    "change",
    [{"do_normalize": False}, {"size": {"longest_edge": 9}}, {"crop_size": {"height": 99, "width": 99}},
     {"image_mean": [0.5]}, {"size": {"height": 9, "width": 8}}],
)  # fmt: skip
def test_unsupported_processors_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="somewhere"):
        from_hf({**CLIP.to_dict(), **change}, None, "square", "somewhere")
