"""Writes sharded safetensors checkpoints piece by piece, and folders that appear only when complete."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rayva.errors import StorageError, WeightsError

_UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip
SHARD_BYTES = 4 * 1024**3
"""Tensors that are held in memory before they are written, in bytes."""


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` at the end, or vanishes on an error.

    Raises:
        WeightsError: `target` exists already.
    """
    if target.exists() or target.is_symlink():
        raise WeightsError(f"{target} exists already", "choose another folder, or delete this one")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turns an `OSError` about room or rights, raised while `target` is written, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise StorageError(
            f"{target} cannot be written: {os.strerror(error.errno or 0)}",
            "free some space there, or choose another place that you may write to",
        ) from error


class CheckpointWriter:
    """Writes a checkpoint as it is added: a file whenever `limit` bytes are waiting, the index last.

    The files get their names at the end, because those tell how many there are. A checkpoint of one
    file needs no index.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._waiting_bytes = 0

    def add(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Adds tensors, one at a time."""
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, tensor in pairs:
            if self._waiting and self._waiting_bytes + tensor.nbytes > self._limit:
                self.flush()
            self._waiting[name] = tensor.contiguous()
            self._waiting_bytes += tensor.nbytes
            self._bytes += tensor.nbytes

    def flush(self) -> None:
        """Ends the present file; what comes next goes into another."""
        if self._waiting:
            _save(self._waiting, self._folder / _scratch_name(len(self._shards)))
            self._shards.append(list(self._waiting))
            self._waiting, self._waiting_bytes = {}, 0

    def finish(self) -> None:
        """Names the files, and writes the index if there are several."""
        self.flush()
        total = len(self._shards)
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"
            (self._folder / _scratch_name(number)).rename(self._folder / file)
            places.update(dict.fromkeys(names, file))
        if total > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(places.items()))}
            write_json(self._folder / "model.safetensors.index.json", index)


def _scratch_name(number: int) -> str:
    return f"unfinished-{number:05d}"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells a full disk in words only; callers look at the number.
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
