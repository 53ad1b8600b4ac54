"""Where input files are: local paths and fsspec URIs, treated alike."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any, cast

import fsspec

from rayva import remote
from rayva.data.quarantine import BadRow
from rayva.errors import DataError


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path in it; `DataError` for an unknown protocol."""
    if is_local(uri):  # "::" is part of a file's name there, and not fsspec's sign for a file in another
        return fsspec.filesystem("file"), absolute(uri.removeprefix("file://"))
    try:
        return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{uri!r} cannot be opened: {error}",
            "use a local path or a URI whose fsspec package is installed (s3fs, gcsfs, ...)",
        ) from error


def is_local(uri: str) -> bool:
    """Whether `uri` is on a local (or mounted) disk."""
    return "://" not in uri or uri.startswith("file://")


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, unless it is already an absolute path or a URI."""
    if "://" in name or os.path.isabs(name):
        return name
    first, rest = split_chain(folder)
    root = first if first.endswith("://") else f"{first.rstrip('/')}/"
    return f"{root}{name.removeprefix('./')}{rest}"


def parent(uri: str) -> str:
    """The folder that `uri` lies in."""
    first, rest = split_chain(uri)
    head, separator, _ = first.rpartition("/")
    if head.endswith(":/"):
        head += "/"  # a place's root: memory://, or zip:// of an archive
    return (head or "/") + rest if separator else "."


def split_chain(uri: str) -> tuple[str, str]:
    """The path itself, and what it lies in: `zip://a/b.png` and `::s3://bucket/z.zip`, or nothing."""
    if is_local(uri):
        return uri, ""
    first, separator, rest = uri.partition("::")
    return first, separator + rest


def absolute(uri: str) -> str:
    """`uri` as workers on other nodes can use it: local paths are made absolute."""
    return os.path.abspath(os.path.expanduser(uri)) if "://" not in uri else uri


def open_input(uri: str, setting: str) -> IO[bytes]:
    """Opens a file for reading; a .gz file is unpacked on the way.

    Args:
        setting: the recipe's key that named it, for the message.

    Raises:
        DataError: the file is missing or cannot be read; also while it is read, where it is remote.
    """
    with reading(uri, setting):
        system, path = file_system(uri)
        file = system.open(path, "rb")
    if not is_local(uri):
        file = remote.RemoteFile(file, lambda error: _unreadable(uri, setting, error), system)
    return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb") if path.endswith(".gz") else file)


def list_folder(uri: str, setting: str) -> list[str]:
    """Paths of all files under a folder, relative to it, sorted; `DataError` where there is none."""
    with reading(uri, setting):
        system, root = file_system(uri)
        if not system.isdir(root):
            raise NotADirectoryError(f"{uri} is not a folder")
        base = PurePosixPath(root)
        return sorted(str(PurePosixPath(path).relative_to(base)) for path in system.find(root))


def is_folder(uri: str, setting: str) -> bool:
    """Whether `uri` is an existing folder; `DataError` where that cannot be found out."""
    with reading(uri, setting):
        system, path = file_system(uri)
        return bool(system.isdir(path))


def is_there(uri: str, setting: str) -> bool:
    """Whether `uri` is an existing file or folder; `DataError` where that cannot be found out."""
    with reading(uri, setting):
        system, path = file_system(uri)
        return bool(system.exists(path))


@contextmanager
def reading(uri: str, setting: str) -> Iterator[None]:
    """Turns what file systems raise inside into a `DataError` about `uri`, given as `setting`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or remote.is_failure(error):
            raise _unreadable(uri, setting, remote.behind(error)) from error
        raise


def _unreadable(uri: str, setting: str, error: Exception) -> DataError:
    why = "it does not exist" if isinstance(error, FileNotFoundError) else remote.reason(error)
    mend = f"check the path given as {setting}"
    if not is_local(uri) and remote.is_failure(error):
        mend = f"{remote.remedy(error)}; or {mend}"
    return DataError(f"{setting} = {uri} cannot be read: {why}", mend)


class ImageFolder:
    """Resolves image names against a folder and tells cheaply whether local files exist.

    Each local folder is listed once, so that 600,000 images cost a few hundred listings and not
    600,000 lookups. Remote images are not checked here: the features step quarantines missing ones.
    """

    def __init__(self, root: str) -> None:
        self.root = absolute(root)
        self._listings: dict[str, frozenset[str]] = {}

    def resolve(self, name: str) -> str:
        """The URI of the image `name`.

        Raises:
            BadRow: "bad_image_field" for a name that no file can have or that leads out of the folder,
                "missing_image" for an absent file.
        """
        if not name or "\0" in name:
            raise BadRow("bad_image_field", f"{name!r} is no file name")
        if os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise BadRow("bad_image_field", f"{name!r} leads out of the image folder")
        uri = join(self.root, self.plain(name))
        if is_local(uri) and not self._exists(uri.removeprefix("file://")):
            raise BadRow("missing_image", f"there is no file {uri}")
        return uri

    def plain(self, name: str) -> str:
        """One spelling of the image `name`: on a disk `./b/a.png`, `b//a.png` and `b/./a.png` are one file.

        In an object store, the last two are keys of their own. Where `b/..` leads, only the disk knows.
        """
        if "://" in name or not is_local(self.root):
            return name.removeprefix("./")
        return str(PurePosixPath(name))

    def _exists(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listings[folder] = frozenset()  # no such folder: none of its files exists
        return name in self._listings[folder]
