"""Image preprocessing: bit-equal to Hugging Face's image processors (Pillow backend).

The work is split where the data is smallest: `to_uint8` (resize and crop, on the CPU) gives bytes
that are cheap to send, `normalize` turns them into float32 next to the network.

Shape suffixes: B images, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from rayva.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Aspect = Literal["square", "pad"]

_MOST_SIDE = 1 << 14
_FILTERS = 5
"""The highest of Pillow's numbers for its filters."""
_ELONGATED = 16
_MOST_PIXELS = 1 << 26
"""Pictures of this ratio of the sides or more, whose intermediate picture would be larger than this, are
prepared in an order that needs less memory; the result is equal but for rounding."""


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture before the tower sees it.

    Attributes:
        image_size: side of the square that the tower sees, in pixels.
        resize_to: length of the shorter side after resizing, before the centre crop.
        stretch: resize straight to the square, changing the aspect ratio (SigLIP), without a crop.
        resample: Pillow's number of the filter (3 is bicubic).
        rescale: factor from bytes to [0, 1].
        aspect: `pad` first pads to a square with the mean colour (LLaVA-1.5).
    """

    image_size: int
    resize_to: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255
    stretch: bool = False
    aspect: Aspect = "square"

    def describe(self) -> dict[str, Any]:
        """JSON data that decides the result, for digests."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def to_uint8(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures of any size -> uint8 [B, H, W, 3]."""
        pixels_BHW3 = np.empty((len(images), self.image_size, self.image_size, 3), dtype=np.uint8)
        for target, image in zip(pixels_BHW3, images, strict=True):
            target[:] = np.asarray(self._fit(image))
        return pixels_BHW3

    def normalize(self, pixels_BHW3: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] on the same device.

        Rescaled in float64, then rounded and standardised in float32: the processors' own order, which
        decides the last bit.
        """
        import torch

        device = pixels_BHW3.device
        levels = (torch.arange(256, dtype=torch.float64) * self.rescale).to(torch.float32)
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (self.mean, self.std))
        table = ((levels - mean) / std).to(device)  # the value of each of 256 levels in each channel
        out = torch.empty(pixels_BHW3.permute(0, 3, 1, 2).shape, dtype=torch.float32, device=device)
        for channel in range(3):
            index = pixels_BHW3[..., channel].to(torch.int32).reshape(-1)
            out[:, channel] = table[channel].index_select(0, index).view(out[:, channel].shape)
        return out

    def _fit(self, image: Image.Image) -> Image.Image:
        side = self.image_size
        if self.aspect == "pad":
            image = self._padded(image)
        if self.stretch:
            return image.resize((side, side), self.resample)
        width, height = image.size
        short, long = min(width, height), max(width, height)
        resized_long = int(self.resize_to * long / short)
        if long >= _ELONGATED * short and resized_long * self.resize_to > _MOST_PIXELS:
            return self._crop_first(image)
        size = (self.resize_to, resized_long) if width <= height else (resized_long, self.resize_to)
        left, top = ((extent - side) // 2 for extent in size)
        return image.resize(size, self.resample).crop((left, top, left + side, top + side))

    def _crop_first(self, image: Image.Image) -> Image.Image:
        """Resizes only the part that the centre crop keeps."""
        width, height = image.size
        kept = min(width, height) * self.image_size / self.resize_to
        left, top = (width - kept) / 2, (height - kept) / 2
        box = (left, top, left + kept, top + kept)
        return image.resize((self.image_size, self.image_size), self.resample, box=box)

    def _padded(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the mean colour (LLaVA-1.5)."""
        color = tuple(int(value * 255) for value in self.mean)
        width, height = image.size
        longest = max(width, height)
        if longest >= _ELONGATED * min(width, height) and longest**2 > _MOST_PIXELS:
            # Shrunk, then padded: padding first would need the square of the longer side.
            side = self.resize_to
            size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
            return _centred(image.resize(size, self.resample), side, color)
        return _centred(image, longest, color)


def _centred(image: Image.Image, side: int, color: tuple[int, ...]) -> Image.Image:
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def from_hf(config: dict[str, Any], image_size: int | None, aspect: Aspect, where: str) -> Preprocessing:
    """Reads a Hugging Face `preprocessor_config.json`.

    Args:
        config: the file's contents.
        image_size: overrides the processor's own size; None keeps it.
        where: names the file in errors.

    Raises:
        WeightsError: where the file asks for steps that are not supported here.
    """
    remedy = "use a tower whose image processor resizes, rescales and normalises, such as CLIP's or SigLIP's"
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise WeightsError(f"{where} sets {step} to false, which is not supported.", remedy)
    try:
        shorter, stretch = _size(config["size"])
        crop = _size(config["crop_size"])[0] if config.get("do_center_crop") else shorter
        mean, std = (tuple(float(v) for v in config[key]) for key in ("image_mean", "image_std"))
        resample, rescale = int(config.get("resample", 3)), float(config.get("rescale_factor", 1 / 255))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{where} lacks or misstates {error}.", remedy) from error
    if not 0 < crop <= shorter <= _MOST_SIDE or len(mean) != 3 or len(std) != 3:
        raise WeightsError(f"{where} crops more than it resizes to, or has not three channels.", remedy)
    usable = all(map(math.isfinite, (*mean, *std, rescale))) and min(std) > 0 and rescale > 0
    if not usable or not all(0 <= value <= 1 for value in mean) or not 0 <= resample <= _FILTERS:
        raise WeightsError(
            f"{where}: a mean, deviation, rescale_factor or resample filter is out of range.", remedy
        )
    final = image_size or crop
    return Preprocessing(
        image_size=final,
        resize_to=round(shorter * final / crop),
        mean=mean,
        std=std,
        resample=resample,
        rescale=rescale,
        stretch=stretch and aspect == "square",
        aspect=aspect,
    )


def _size(size: int | dict[str, int]) -> tuple[int, bool]:
    """(side, whether the picture is stretched to a square) of a processor's `size` or `crop_size`."""
    if isinstance(size, int):
        return size, False
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), False
    if size["height"] != size["width"]:
        raise ValueError(f"a square size (it is {size})")
    return int(size["height"]), True
