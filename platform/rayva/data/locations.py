"""Where input files are: local paths and fsspec URIs, treated alike."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec

from rayva.data.quarantine import BadRow
from rayva.errors import DataError


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path in it; `DataError` for an unknown protocol."""
    try:
        return fsspec.core.url_to_fs(os.path.expanduser(uri))  # type: ignore[no-any-return]
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
    return f"{folder.rstrip('/')}/{name.removeprefix('./')}"


def parent(uri: str) -> str:
    """The folder that `uri` lies in."""
    head, separator, _ = uri.rpartition("/")
    return (head or "/") if separator else "."


def absolute(uri: str) -> str:
    """`uri` as workers on other nodes can use it: local paths are made absolute."""
    return os.path.abspath(os.path.expanduser(uri)) if "://" not in uri else uri


def open_input(uri: str, setting: str) -> IO[bytes]:
    """Opens a file for reading; a .gz file is unpacked on the way.

    Args:
        setting: the recipe's key that named it, for the message.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    system, path = file_system(uri)
    try:
        compression = "gzip" if path.endswith(".gz") else None
        return system.open(path, "rb", compression=compression)  # type: ignore[no-any-return]
    except OSError as error:
        raise _unreadable(uri, setting, error) from error


def list_folder(uri: str, setting: str) -> list[str]:
    """Paths of all files under a folder, relative to it, sorted; `DataError` where there is none."""
    system, root = file_system(uri)
    try:
        if not system.isdir(root):
            raise NotADirectoryError(f"{uri} is not a folder")
        base = PurePosixPath(root)
        return sorted(str(PurePosixPath(path).relative_to(base)) for path in system.find(root))
    except OSError as error:
        raise _unreadable(uri, setting, error) from error


def is_folder(uri: str) -> bool:
    """Whether `uri` is an existing folder."""
    system, path = file_system(uri)
    return bool(system.isdir(path))


def _unreadable(uri: str, setting: str, error: OSError) -> DataError:
    why = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
    return DataError(f"{setting} = {uri} cannot be read: {why}", f"check the path given as {setting}")


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
        uri = join(self.root, name)
        if is_local(uri) and not self._exists(uri.removeprefix("file://")):
            raise BadRow("missing_image", f"there is no file {uri}")
        return uri

    def _exists(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listings[folder] = frozenset()  # no such folder: none of its files exists
        return name in self._listings[folder]
