"""The media guard: the only way for a picture to enter the endpoint.

Pictures come inside the request as base64 data URIs. Nothing is fetched: a request cannot make the
server open a connection or a file. Bytes are capped before they are decoded from base64, pixels
before they are decoded from the picture format.
"""

from __future__ import annotations

import base64
import binascii

from PIL import Image

from rayva.recipes.schema import Serving
from rayva.serving.errors import ApiError, bad_request
from rayva.vision.decode import BadImage, decode_image

MAX_PIXELS = 50_000_000
_TEXT_OVERHEAD = 2 * 1024 * 1024


def max_body_bytes(limits: Serving) -> int:
    """Largest request body in bytes: all images in base64, and room for the text."""
    return limits.max_images * (_base64_length(limits.max_image_bytes) + 128) + _TEXT_OVERHEAD


def _base64_length(count: int) -> int:
    return (count + 2) // 3 * 4


def load_images(uris: tuple[str, ...], limits: Serving) -> list[Image.Image]:
    """Decodes data URIs to RGB pictures.

    Raises:
        ApiError: 400 for anything that is no picture in a data URI, 413 for one that is too large.
    """
    return [_load(uri, index, limits) for index, uri in enumerate(uris)]


def _load(uri: str, index: int, limits: Serving) -> Image.Image:
    data = _decode_uri(uri, index, limits.max_image_bytes)
    try:
        return decode_image(data, max_pixels=MAX_PIXELS, max_bytes=limits.max_image_bytes)
    except BadImage as error:
        status = 413 if error.reason in ("too_many_pixels", "too_many_bytes") else 400
        raise ApiError(status, f"image {index}: {error}", "messages", error.reason) from None


def _decode_uri(uri: str, index: int, max_bytes: int) -> bytes:
    header, comma, _ = uri[:256].partition(",")
    scheme = header.partition(":")[0].lower()
    if scheme in ("http", "https", "file", "ftp", "s3", "gs"):
        what = f"image {index}: {scheme} addresses are not fetched; send the picture as a data URI"
        raise bad_request(f"{what} (data:image/png;base64,...)", "messages", "unsupported_image_url")
    kind = header.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise bad_request(
            f"image {index}: expected a data URI of the form data:image/png;base64,...",
            "messages",
            "unsupported_image_url",
        )
    body = uri[len(header) + 1 :]
    if len(body) > _base64_length(max_bytes):
        raise ApiError(413, f"image {index} is larger than {max_bytes} bytes", "messages", "too_many_bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        wrapped = " (it is to stand on one line, as `base64 -w0` writes it)" if "\n" in body else ""
        what = f"image {index}: the data URI is not valid base64{wrapped}"
        raise bad_request(what, "messages", "invalid_base64") from None
