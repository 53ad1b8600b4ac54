"""Reads checkpoints of other programs safely: files are described first, tensors are read one by one.

Nothing in a checkpoint is trusted. Torch archives are read as tensors alone (`weights_only=True`), so
that no code in them can run; names in an index stay inside their folder; what a file holds is known
before any of it is copied. Every complaint names the file, and the key where there is one.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayva.errors import WeightsError
from rayva.progress import Progress

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Precisions of weights, by their names in safetensors."""
_REMEDY = "fetch or save the checkpoint again"
_LARGE = 1024**3
_MOST_JSON = 64 * 1024 * 1024
_INDEXED = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is described but not read yet.

    Attributes:
        file, key: where it is stored, for complaints.
        dtype: one of `FLOATS`; other precisions are known by their name alone.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]

    @property
    def where(self) -> str:
        """File and key, as complaints name them."""
        return f"{self.file}: {self.key}"

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 where the precision is none of `FLOATS`."""
        width = self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0
        return torch.Size(self.shape).numel() * width

    def load(self) -> Tensor:
        """The tensor itself.

        Raises:
            WeightsError: it cannot be read, or holds a value that is not finite.
        """
        try:
            tensor = self.read()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise WeightsError(f"{self.where} cannot be read: {error}", _REMEDY) from error
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{self.where} holds values that are not finite", _REMEDY)
        return tensor


Tensors = dict[str, LazyTensor]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        WeightsError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}", "give the folder of a complete checkpoint")
    if path.stat().st_size > _MOST_JSON:
        raise WeightsError(f"{path} is too large for JSON of a checkpoint", _REMEDY)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: {error}", _REMEDY) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no JSON object", _REMEDY)
    return found


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a model's weight files, whole or indexed."""
    return any((folder / name).is_file() for pair in _INDEXED for name in pair)


def open_checkpoint(folder: Path) -> Tensors:
    """Every tensor of a folder's weight files by its name: safetensors if there are any, else `.bin`.

    Raises:
        WeightsError: no weights, a damaged file, or an index that does not say what the files hold.
    """
    for whole, index in _INDEXED:
        if (folder / whole).is_file():
            return open_weights(folder / whole)
        if (folder / index).is_file():
            return _open_shards(folder, folder / index)
    names = ", ".join(name for pair in _INDEXED for name in pair)
    raise WeightsError(
        f"{folder} holds no weights (none of {names})", "give the folder of a complete checkpoint"
    )


def _open_shards(folder: Path, index: Path) -> Tensors:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index}: weight_map is missing or names no tensor", _REMEDY)
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(
                f"{index}: {key} is placed in {name!r}, which is no file of this folder", _REMEDY
            )
    tensors: Tensors = {}
    for name in sorted(set(places.values())):
        for key, tensor in open_weights(folder / name).items():
            if places.get(key) != name:
                said = f"in {places[key]}" if key in places else "nowhere"
                raise WeightsError(f"{tensor.where} is {said} according to {index.name}", _REMEDY)
            tensors[key] = tensor
    for key, name in places.items():
        if key not in tensors:
            raise WeightsError(f"{folder / name}: {key} is missing, though {index.name} names it", _REMEDY)
    return tensors


def open_weights(file: Path) -> Tensors:
    """The tensors of one file, `.safetensors` or a torch archive.

    Raises:
        WeightsError: no such file, or it is damaged or holds anything but tensors.
    """
    if not file.is_file():
        raise WeightsError(f"there is no file {file}", "complete the checkpoint")
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_archive(file)


def _open_safetensors(file: Path) -> Tensors:
    try:
        handle: Any = safe_open(file, framework="pt")
        tensors = {}
        for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
            part = handle.get_slice(key)
            kind = part.get_dtype()
            read = _reader(handle.get_tensor, key)
            tensors[key] = LazyTensor(file, key, tuple(part.get_shape()), FLOATS.get(kind, kind), read)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}", _REMEDY) from error
    return tensors


def _reader(get: Callable[[str], Tensor], key: str) -> Callable[[], Tensor]:
    return lambda: get(key)


def _open_archive(file: Path) -> Tensors:
    zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_zip(file)
    try:
        # Mapped into memory, tensors are read when they are asked for. Archives from before torch 1.6
        # are no zip files and cannot be mapped.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle fails in any way it likes
        raise WeightsError(
            f"{file} cannot be read as tensors alone: {_unsafe_reason(error)}",
            "it is damaged, or holds objects that would have to run code; save the tensors again",
        ) from error
    if not isinstance(found, Mapping):
        raise WeightsError(f"{file} holds a {type(found).__name__}, not tensors by name", _REMEDY)
    return {key: _described(file, key, value) for key, value in found.items()}


def _unsafe_reason(error: BaseException) -> str:
    """What torch says, without its advice to load the file anyway."""
    text = str(error) or type(error).__name__
    found = text.rpartition("WeightsUnpickler error:")[2] or text
    return " ".join(found.split("\n\n")[0].split())[:300]


def _check_zip(file: Path) -> None:
    """Refuses archives that torch never writes: compressed, encrypted, with twice the same entry."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file} is a damaged archive: {error}", _REMEDY) from error
    times = Counter(entry.filename for entry in entries)
    for entry in entries:
        parts = Path(entry.filename).parts
        odd = (
            (entry.compress_type != zipfile.ZIP_STORED and "it is compressed")
            or (entry.flag_bits & 1 and "it is encrypted")
            or (times[entry.filename] > 1 and "it is there more than once")
            or ((".." in parts or entry.filename.startswith("/")) and "it lies outside the archive")
        )
        if odd:
            raise WeightsError(f"{file}: the entry {entry.filename} is none of torch's: {odd}", _REMEDY)
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise WeightsError(f"{file}: its entries are larger than the file itself", _REMEDY)


def _described(file: Path, key: object, value: object) -> LazyTensor:
    if not isinstance(key, str):
        raise WeightsError(f"{file}: the key {key!r} is no name of a tensor", _REMEDY)
    if not isinstance(value, Tensor):
        raise WeightsError(f"{file}: {key} is a {type(value).__name__}, not a tensor", _REMEDY)
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise WeightsError(f"{file}: {key} is not a plain dense tensor", _REMEDY)
    if value.numel() * value.element_size() > file.stat().st_size:
        raise WeightsError(f"{file}: {key} claims to be larger than the file itself", _REMEDY)
    kind = value.dtype if value.dtype in FLOATS.values() else str(value.dtype).removeprefix("torch.")
    tensor = value.detach()
    return LazyTensor(file, key, tuple(value.shape), kind, lambda: tensor)


def check_part(
    what: str, tensors: Tensors, expected: Mapping[str, tuple[int, ...]], where: str, config: str
) -> None:
    """Checks names, shapes and precisions of one part of a model.

    Args:
        what: names the part ("language model").
        tensors: by their names in Rayva's folder.
        expected: shapes by name.
        where: names the files in complaints, where there is no tensor at all.
        config: names what the shapes follow from.

    Raises:
        WeightsError: a key that is missing or unknown, a shape or a precision that does not fit.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise WeightsError(
                f"{files_of(tensors, where)} lacks {stored_name(tensors, name)} {list(shape)}, which "
                f"{config} describes ({what})",
                _REMEDY,
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise WeightsError(
                f"{tensor.where} is unknown: {config} describes no such part of the {what}", _REMEDY
            )
        if tensor.shape != expected[name]:
            raise WeightsError(
                f"{tensor.where} has the shape {list(tensor.shape)}; "
                f"{config} describes {list(expected[name])}",
                _REMEDY,
            )
    check_precision(what, tensors.values())


def files_of(tensors: Tensors, where: str) -> str:
    """Names the files that a part is stored in."""
    files = sorted({str(tensor.file) for tensor in tensors.values()})
    return ", ".join(files) if 0 < len(files) <= 4 else where


def stored_name(tensors: Tensors, name: str) -> str:
    """How a checkpoint would call the tensor that Rayva calls `name`, judged by one that it has."""
    for known, tensor in tensors.items():
        pairs = zip(reversed(known), reversed(tensor.key), strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        mine, theirs = known[: len(known) - common], tensor.key[: len(tensor.key) - common]
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return name


def check_precision(what: str, tensors: Iterable[LazyTensor]) -> None:
    """All tensors of a part have one precision: float32, float16 or bfloat16."""
    first: LazyTensor | None = None
    for tensor in tensors:
        if not isinstance(tensor.dtype, torch.dtype):
            raise WeightsError(
                f"{tensor.where} has the precision {tensor.dtype}; weights are float32, float16 or bfloat16",
                _REMEDY,
            )
        first = first or tensor
        if tensor.dtype != first.dtype:
            raise WeightsError(
                f"{tensor.where} is {_name(tensor.dtype)}, but other tensors of the {what} "
                f"({first.key}) are {_name(first.dtype)}",
                _REMEDY,
            )


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def renamed(tensors: Tensors, new_name: Callable[[str], str | None]) -> Tensors:
    """Tensors under `new_name` of their names; those that it gives None are left out.

    Raises:
        WeightsError: two tensors would get the same name.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        new = new_name(name)
        if new is None:
            continue
        if new in result:
            raise WeightsError(f"{tensor.where} and {result[new].key} are the same tensor twice", _REMEDY)
        result[new] = tensor
    return result


def computed(
    tensor: LazyTensor, read: Callable[[], Tensor], shape: tuple[int, ...] | None = None
) -> LazyTensor:
    """`tensor` with another content, in the same precision."""
    return replace(tensor, read=read, shape=shape or tensor.shape)


def load_each(tensors: Tensors, what: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one at a time and such that each file is read through once.

    Where it takes long, progress is told.
    """
    order = sorted(tensors.items(), key=lambda item: (str(item[1].file), item[0]))
    large = sum(tensor.nbytes for tensor in tensors.values()) > _LARGE
    progress = Progress(what, len(order), "tensors") if large else None
    for name, tensor in order:
        yield name, tensor.load()
        if progress:
            progress.advance()
    if progress:
        progress.close()
