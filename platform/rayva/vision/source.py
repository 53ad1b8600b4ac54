"""Reads the bytes of an image from a local path or any fsspec URI."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import IO

import fsspec

from rayva import remote
from rayva.data.locations import is_local
from rayva.errors import DataError
from rayva.redaction import redact
from rayva.vision.decode import DEFAULT_MAX_BYTES, BadImage

_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO}
"""ENXIO: a socket's."""
_REFUSED = {400, 401, 403, 410, 414, 451}
"""HTTP's answers about one file; others (429, 503) say that the server is in trouble."""
# What fsspec and the file systems raise for a URI that they cannot make sense of, or have no package for.
_NO_URI = (ImportError, ValueError, TypeError, AttributeError, LookupError)


def read_image_bytes(uri: str, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The file's bytes; of a file over `max_bytes` no more than that is read.

    Raises:
        BadImage: "missing" where there is no such file, "unreadable" where its name or URI cannot be opened
            or it may not be read, "too_many_bytes" where it is too large.
        DataError: where the storage itself fails, which says nothing about the image.
    """
    try:
        with _open(uri) as file:
            data = bytes(file.read(max_bytes + 1))
    except BadImage:
        raise
    except Exception as error:
        known = _told(uri, remote.behind(error))
        if known is None:
            raise
        raise known from error
    if len(data) > max_bytes:
        raise BadImage("too_many_bytes", f"{redact(uri)} is over the limit of {max_bytes:,} bytes")
    return data


def _told(uri: str, error: Exception) -> Exception | None:
    """What `error` means: a fault of the image, or of the storage; None for a defect."""
    if isinstance(error, _MISSING):
        return BadImage("missing", f"there is no file {redact(uri)}")
    if _is_about_the_image(error):
        return _unreadable(uri, error)
    if remote.is_failure(error):
        why = redact(f"The image {uri} cannot be read: {remote.reason(error)}")
        return DataError(why, "check the disk" if is_local(uri) else remote.remedy(error))
    return None


@contextlib.contextmanager
def _open(uri: str) -> Iterator[IO[bytes]]:
    try:
        if is_local(uri):  # "::" is part of the name there
            file = _open_regular(os.path.expanduser(uri.removeprefix("file://")))
        else:
            # Kept until the file is read: an archive is closed when nobody has its file system any more.
            system, path = fsspec.core.url_to_fs(uri)
            file = system.open(path, "rb")
    except _NO_URI as error:
        raise _unreadable(uri, error) from error
    with file:
        yield file


def _open_regular(path: str) -> IO[bytes]:
    """Refuses pipes and devices: reading one may never end, and so may opening a pipe that nobody writes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise BadImage("unreadable", f"{path} is no regular file but a pipe, a socket or a device")


def _unreadable(uri: str, error: Exception) -> BadImage:
    return BadImage("unreadable", redact(f"{uri} cannot be opened: {remote.reason(error)}"))


def _is_about_the_image(error: Exception) -> bool:
    return (
        isinstance(error, PermissionError)
        or (isinstance(error, OSError) and error.errno in _NO_SUCH_NAME and error.filename is not None)
        or getattr(error, "status", None) in _REFUSED
        # botocore: no name of a bucket or an object; aiohttp: no URL
        or type(error).__name__ in ("ParamValidationError", "InvalidURL", "InvalidUrlClientError")
    )
