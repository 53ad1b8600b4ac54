"""From encoded bytes to an RGB picture, or to the reason why there is none.

Bytes come from strangers: the formats are an allow-list, sizes are checked before any pixel is
decoded, and every failure is a `BadImage` with a reason that machines can count.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from rayva.errors import DataError

Reason = Literal["missing", "unreadable", "truncated", "not_an_image", "too_many_pixels", "too_many_bytes"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DEFAULT_MAX_PIXELS = 89_478_485
DEFAULT_MAX_BYTES = 64 * 1024 * 1024

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
_WHITE = (255, 255, 255, 255)
_REMEDY = "Replace the file by a JPEG, PNG, WebP, GIF, BMP or TIFF picture within the size limits."

# What Pillow's decoders raise on damaged data; most are OSError, the rest are theirs too.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip

# The size is checked here against the caller's own limit, before a pixel is decoded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(DataError):
    """An image that cannot be used. `reason` is one of `Reason`, `detail` is for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"The image cannot be used ({reason}): {detail}", _REMEDY)
        self.args = (reason, detail)
        self.reason: Reason = reason
        self.detail = detail


def decode_image(
    data: bytes | None, max_pixels: int = DEFAULT_MAX_PIXELS, max_bytes: int = DEFAULT_MAX_BYTES
) -> Image.Image:
    """Decodes one picture to RGB, upright, 8 bits a channel.

    EXIF orientation is applied, transparency is laid over white, CMYK, palette, grey and 16-bit
    pictures are converted, of an animation the first frame is taken.

    Raises:
        BadImage: for every input that is not a usable picture.
    """
    if data is None:
        raise BadImage("missing", "there are no bytes")
    if not data:
        raise BadImage("truncated", "the file is empty")
    if len(data) > max_bytes:
        raise BadImage("too_many_bytes", f"{len(data):,} bytes, the limit is {max_bytes:,}")
    _raise_pillows_limit(max_pixels)
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height} pixels, the limit is {max_pixels:,}")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except _DECODE_ERRORS as error:
        raise BadImage("truncated", f"{image.format} data is damaged or ends early: {error}") from error


def _raise_pillows_limit(max_pixels: int) -> None:
    """Pillow has a limit of its own, of the whole process, and asks it first: it must not be the lower one.

    It is not taken away, because it also guards what the picture's size does not tell, such as TIFF's tiles.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except _DECODE_ERRORS as error:
        if data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            raise BadImage("truncated", f"the header is damaged or ends early: {error}") from error
        raise BadImage("not_an_image", f"none of {', '.join(FORMATS)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("not_an_image", "floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        overlay = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", overlay.size, _WHITE), overlay)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Keeps the high byte; Pillow's own conversion would clip everything above 255 to white."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF)
    return Image.fromarray((values >> 8).astype(np.uint8))
