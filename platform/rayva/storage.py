"""The storage root: one folder, on a local disk or any fsspec file system, that holds a whole run.

Nothing is written outside it. Every path handed to `Storage` is relative to the root.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec

from rayva import remote
from rayva.errors import StorageError
from rayva.redaction import holds_secret, redact

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_PROBE_BYTES = 1 << 20
_ONE_SLASH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")
_OTHER_PLACE = (
    "use a local path, or a URI that can be reached and written and whose fsspec package is installed (s3fs, "
    "gcsfs, ...)"
)
_counter = itertools.count()


def translate_os_error(error: OSError, path: str) -> StorageError:
    """The `StorageError` that says what `error` means for a person who wants to write `path`."""
    if error.errno in _FULL:
        return StorageError(
            f"No space is left to write {path} ({os.strerror(error.errno or 0)}).",
            "free some space, or choose another place with --storage; then run the same command again",
        )
    if error.errno in _READ_ONLY:
        return StorageError(
            f"{path} cannot be written ({os.strerror(error.errno or 0)}).",
            "give this user the right to write there, or choose another place with --storage",
        )
    if error.errno in {errno.ENOTDIR, errno.EEXIST}:
        return StorageError(
            f"{path} cannot be written: something on the way to it is a file, not a folder.",
            "choose another place with --storage",
        )
    return StorageError(f"{path} cannot be used: {error}.", "check the path given with --storage")


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turns an `OSError` about room or rights, raised inside, into a `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL | _READ_ONLY | {errno.ENOTDIR, errno.EEXIST}:
            raise translate_os_error(error, path) from error
        raise


def remote_error(error: Exception, uri: str) -> StorageError:
    """The `StorageError` for a remote file system's failure (`remote.is_failure`) at `uri`."""
    if isinstance(error, OSError) and error.errno in _FULL | _READ_ONLY:
        return translate_os_error(error, uri)
    return StorageError(f"{uri} cannot be used: {remote.reason(error)}.", remote.remedy(error))


class _Translated(io.BufferedWriter):
    """A file open for writing whose errors about room are `StorageError`s, also when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._path = path

    def write(self, data: Any) -> int:
        with storage_errors(self._path):
            return super().write(data)

    def flush(self) -> None:
        with storage_errors(self._path):
            super().flush()

    def close(self) -> None:
        with storage_errors(self._path):
            super().close()


class Storage:
    """A run's root folder: a local path (made absolute) or an fsspec URI such as `s3://bucket/run`.

    Where a remote root cannot be reached, or lets nobody in, every method raises a `StorageError`, and so do
    the files that it opens.
    """

    def __init__(self, root: str) -> None:
        if not root:
            raise StorageError(
                "The storage's name is empty.", "give a folder or URI (is a variable of the shell not set?)"
            )
        if _ONE_SLASH.match(root):
            raise StorageError(
                f"The storage {root!r} is neither a path nor a URI.",
                f"write {root.replace(':/', '://', 1)}, or ./{root} for a folder of that name",
            )
        self.fs, path = _open_root(root)
        protocols = self.fs.protocol
        self.is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._base = os.path.abspath(os.path.expanduser(path)) if self.is_local else path.rstrip("/")
        self.root = self._base if self.is_local else self.fs.unstrip_protocol(self._base)
        if not self.is_local and any(sign in self._base for sign in "*?["):
            raise StorageError(f"The storage {root!r} has one of *, ? and [ in it.", "choose a plain name")
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def path(self, *parts: str) -> str:
        """The path of `parts` as `self.fs` wants it."""
        rel = PurePosixPath(*parts)
        if rel.is_absolute() or ".." in rel.parts:
            raise ValueError(f"{rel} is not a path under the storage root")
        return self._base if str(rel) == "." else f"{self._base}/{rel}"

    def uri(self, *parts: str) -> str:
        """The path of `parts` as pyarrow, Ray Data and `fsspec.open` want it."""
        path = self.path(*parts)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def reaching(self, rel: str) -> AbstractContextManager[None]:
        """Around any use of `fs`: failures of a remote root become a `StorageError` about `rel`."""
        if self.is_local:
            return contextlib.nullcontext()
        return remote.failures_as(lambda error: remote_error(error, self.uri(rel)))

    def _writing(self, rel: str) -> AbstractContextManager[None]:
        return storage_errors(self.uri(rel)) if self.is_local else self.reaching(rel)

    def exists(self, rel: str) -> bool:
        with self.reaching(rel):
            return bool(self.fs.exists(self.path(rel)))

    def list(self, rel: str = "") -> list[str]:
        """Names in the folder `rel`, sorted; empty where there is no such folder."""
        path = self.path(rel)
        with self.reaching(rel):
            if not self.fs.isdir(path):
                return []
            return sorted(PurePosixPath(name.rstrip("/")).name for name in self.fs.ls(path, detail=False))

    def files(self, rel: str = "") -> dict[str, int]:
        """Bytes of each file under the folder `rel`, however deep, by its path relative to it; sorted."""
        root = self.path(rel)
        with self.reaching(rel):
            found = self.fs.find(root, detail=True)
        return {
            path.removeprefix(root).lstrip("/"): int(info["size"]) for path, info in sorted(found.items())
        }

    def makedirs(self, rel: str = "") -> None:
        with self._writing(rel):
            self.fs.makedirs(self.path(rel), exist_ok=True)

    def delete(self, rel: str) -> None:
        """Removes a file or a whole folder; nothing happens where there is none."""
        if self.exists(rel):
            with self._writing(rel):
                self.fs.rm(self.path(rel), recursive=True)

    def open(self, rel: str, mode: str = "rb") -> IO[Any]:
        """Opens a file; for writing, its folder is made first. Written in place, not atomically."""
        writes = any(flag in mode for flag in "wax")
        if writes:
            self.makedirs(_parent(rel))
        if not self.is_local:
            return self._open_remote(rel, mode)
        if not writes:
            return self.fs.open(self.path(rel), mode)  # type: ignore[no-any-return]
        with storage_errors(self.uri(rel)):
            if mode not in {"w", "wt", "wb"}:
                return self.fs.open(self.path(rel), mode)  # type: ignore[no-any-return]
            raw = _Translated(self.path(rel))
        return raw if mode == "wb" else io.TextIOWrapper(raw, encoding="utf-8")

    def _open_remote(self, rel: str, mode: str) -> IO[Any]:
        uri = self.uri(rel)
        with self.reaching(rel):
            file = self.fs.open(self.path(rel), f"{mode.replace('t', '').replace('b', '')}b")
        raw = cast(IO[bytes], remote.RemoteFile(file, lambda error: remote_error(error, uri)))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def read_bytes(self, rel: str) -> bytes:
        with self.reaching(rel):
            return bytes(self.fs.cat_file(self.path(rel)))

    def read_json(self, rel: str) -> Any:
        try:
            return json.loads(self.read_bytes(rel))
        except ValueError as error:
            raise StorageError(
                f"{self.uri(rel)} is damaged: {error}.", "delete this file and run the same command again"
            ) from error

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Writes a file whole or not at all, also when the machine dies in between."""
        self.makedirs(_parent(rel))
        path = self.path(rel)
        with self._writing(rel):
            if self.is_local:
                _write_local(path, data)
            else:
                self.fs.pipe_file(path, data)  # an object appears only when its upload is complete

    def write_json(self, rel: str, obj: Any) -> None:
        self.write_bytes(rel, (json.dumps(obj, indent=1, allow_nan=False) + "\n").encode())

    def localize(self, rel: str) -> Path:
        """A local copy of the file or folder `rel`: itself where the root is local.

        Copies live in a scratch folder that goes with this object.
        """
        if self.is_local:
            return Path(self.path(rel))
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="rayva-")
        local = Path(tempfile.mkdtemp(dir=self._scratch.name)) / (PurePosixPath(rel).name or "root")
        with self.reaching(rel), storage_errors(str(local)):
            self.fs.get(self.path(rel), str(local), recursive=True)
        return local

    @contextmanager
    def local_copy(self, rel: str) -> Iterator[Path]:
        """Like `localize`, but what was copied is gone after the `with` block."""
        local = self.localize(rel)
        try:
            yield local
        finally:
            if not self.is_local:
                shutil.rmtree(local.parent, ignore_errors=True)

    def upload(self, local: Path, rel: str) -> None:
        """Puts the local file or folder at `rel`; nothing to do where it already lies there."""
        target = self.path(rel)
        if self.is_local and Path(target).resolve() == local.resolve():
            return
        self.makedirs(_parent(rel))
        with self._writing(rel):
            # fsspec would put a folder inside an existing one of its name.
            if local.is_dir():
                for file in sorted(path for path in local.rglob("*") if path.is_file()):
                    destination = f"{target}/{file.relative_to(local).as_posix()}"
                    self.fs.makedirs(destination.rpartition("/")[0], exist_ok=True)
                    self.fs.put_file(str(file), destination)
            else:
                self.fs.put_file(str(local), target)

    def check_writable(self) -> None:
        """Proves by writing that the root can be written and has room.

        Raises:
            StorageError: names the path, the reason and the remedy.
        """
        if self.is_local:
            self._check_writable()
            return
        try:
            self._check_writable()
        except StorageError:
            raise
        except Exception as error:  # what file systems raise that cannot write has no common kind
            what = f"The storage {_shown(self.root)} cannot be written: {redact(remote.reason(error))}."
            raise StorageError(what, _OTHER_PLACE) from error

    def _check_writable(self) -> None:
        probe = f".probe-{os.getpid()}-{next(_counter)}"
        try:
            self.write_bytes(probe, bytes(_PROBE_BYTES))
            self.delete(probe)
        except OSError as error:
            raise translate_os_error(error, self.root) from error


def _open_root(root: str) -> tuple[Any, str]:
    """The file system of a storage's root, and the root's path in it.

    Raises:
        StorageError: the root names no place, or its file system cannot be opened.
    """
    kind, separator, rest = root.partition("://")
    if not separator and not root.startswith("data:"):
        return fsspec.filesystem("file"), root  # "::" is part of a folder's name there
    if separator and not (kind and (rest if kind in ("file", "local") else rest.strip("/"))):
        raise StorageError(f"The storage {root!r} names no place.", "write for example s3://bucket/run")
    try:
        # Other processes write here too: a cached listing would be wrong.
        return fsspec.core.url_to_fs(root, use_listings_cache=False)  # type: ignore[no-any-return]
    except Exception as error:  # file systems of all makes: some connect, load libraries or open files
        what = f"The storage {_shown(root)!r} cannot be opened: {redact(remote.reason(error))}."
        raise StorageError(what, _OTHER_PLACE) from error


def _shown(root: str) -> str:
    return redact(root) if holds_secret(root) else root


def _parent(rel: str) -> str:
    parent = str(PurePosixPath(rel).parent)
    return "" if parent == "." else parent


def _write_local(path: str, data: bytes) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{next(_counter)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The new name survives a power cut only when the folder itself is on the disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
