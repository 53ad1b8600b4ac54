"""When a remote file system fails: what its client raises then, and what people are told.

Few of these exceptions are `OSError`s. Those of botocore are not (no credentials, no answer from the
endpoint), nor are Google's and Azure's; so they are known by the package that they come from.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

T = TypeVar("T")

_CLIENTS = {
    "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub",
    "paramiko", "urllib3",
}  # fmt: skip
_ABOUT_A_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_GONE = {404, 410}
_NO_ENDPOINT = "Invalid endpoint"
"""How botocore's `ValueError` about an AWS_ENDPOINT_URL that is no URL begins."""
_RIGHTS = ("Auth", "Credential", "Profile", "Token")
"""Parts of the names of exceptions about who asks: NoCredentialsError, DefaultCredentialsError, ..."""


def is_failure(error: Exception) -> bool:
    """Whether `error` says that a remote place cannot be used, and not that there is no such file."""
    if isinstance(error, OSError):
        return not isinstance(error, _ABOUT_A_FILE)
    if type(error) is ValueError and str(error).startswith(_NO_ENDPOINT):
        return True
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def behind(error: Exception) -> Exception:
    """`error` itself, or the failure that a file system has told as "no such file".

    fsspec's http does so with whatever keeps it from a file. Only 404 and 410 mean that there is none.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    http = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if http and getattr(cause, "status", None) not in _GONE else error


def reason(error: Exception) -> str:
    """What `error` says; some say nothing but their name."""
    return str(error).rstrip(".") or type(error).__name__


def remedy(error: Exception) -> str:
    """What a person can do about a failure."""
    if isinstance(error, PermissionError) or any(part in type(error).__name__ for part in _RIGHTS):
        return (
            "give every node credentials with rights to it (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    return (
        "check its name, the network and the endpoint (for S3: AWS_ENDPOINT_URL), then run the command again"
    )


@contextmanager
def failures_as(make: Callable[[Exception], Exception]) -> Iterator[None]:
    """Turns a failure (`is_failure`) raised inside into the exception that `make` makes of it."""
    try:
        yield
    except Exception as error:
        if is_failure(error):
            raise make(error) from error
        raise


class RemoteFile(io.BufferedIOBase):
    """An open file of a remote file system. It is read and written long after it was opened, and every
    failure on the way is what `make` makes of it.

    Args:
        system: kept as long as the file: an archive is closed when nobody has its file system any more.
    """

    def __init__(
        self, file: IO[bytes], make: Callable[[Exception], Exception], system: object = None
    ) -> None:
        self._file, self._make, self._system = file, make, system

    def _do(self, call: Callable[..., T], *arguments: Any) -> T:
        with failures_as(self._make):
            return call(*arguments)

    def readable(self) -> bool:
        return self._file.readable()

    def writable(self) -> bool:
        return self._file.writable()

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int | None = -1, /) -> bytes:
        return self._do(self._file.read, -1 if size is None else size)

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._do(self._file.readline, -1 if size is None else size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._do(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any, /) -> int:
        return self._do(self._file.write, data)

    def flush(self) -> None:
        if not self._file.closed:
            self._do(self._file.flush)

    def close(self) -> None:
        """Closes the file; what was written is uploaded only now."""
        try:
            self._do(self._file.close)
        finally:
            super().close()
