"""Reads the bytes of an image from a local path or any fsspec URI."""

from __future__ import annotations

import fsspec

from rayva.vision.decode import DEFAULT_MAX_BYTES, BadImage


def read_image_bytes(uri: str, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The file's bytes; of a file over `max_bytes` no more than that is read.

    Raises:
        BadImage: "missing" where there is no such file, "too_many_bytes" where it is too large.
        OSError: where the storage itself fails, which says nothing about the image.
    """
    try:
        with fsspec.open(uri, "rb") as file:
            data = bytes(file.read(max_bytes + 1))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadImage("missing", f"there is no file {uri}") from error
    if len(data) > max_bytes:
        raise BadImage("too_many_bytes", f"{uri} is over the limit of {max_bytes:,} bytes")
    return data
