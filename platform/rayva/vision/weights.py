"""Finds a tower's folder, reads its files and digests its weights. No torch until tensors are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayva.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_SAFETENSORS = "model*.safetensors"
_TORCH = "pytorch_model*.bin"
# Other files that the patterns above match (model.fp16.safetensors) are the same weights again.
_WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


def resolve_folder(path: str, revision: str | None = None) -> Path:
    """The local folder of `path`: a folder, or a name on the Hugging Face hub (downloaded once).

    Raises:
        WeightsError: where there is no such folder, and no such name or no way to the hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise WeightsError(
            f"There is no weights folder {path}.",
            "give vision.path a folder with config.json and model.safetensors, or a hub name (owner/name)",
        )
    return _download(path, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = snapshot([*_CONFIGS, _SAFETENSORS, "model.safetensors.index.json"])
        if not list(folder.glob(_SAFETENSORS)):
            folder = snapshot([*_CONFIGS, _TORCH])
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightsError(
            f"The weights {name} are neither a local folder nor reachable on the Hugging Face hub: "
            f"{str(error).splitlines()[0]}",
            "check the name and the network, or download them elsewhere and give vision.path the folder",
        ) from error
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in `folder`/`name`; None where there is no such file."""
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        what = f"{folder / name} is damaged: {error}."
        raise WeightsError(what, "fetch the weights folder again") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{folder / name} holds no JSON object.", "fetch the weights folder again")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the tensors: safetensors, or else PyTorch's own format."""
    for whole, parts in _WEIGHTS:
        files = [folder / whole] if (folder / whole).is_file() else sorted(folder.glob(parts))
        if files:
            return files
    names = ", no ".join(name for pair in _WEIGHTS for name in pair)
    raise WeightsError(
        f"{folder} holds no weights (no {names}).", "give vision.path the folder of a complete checkpoint"
    )


def weights_sha256(folder: Path) -> str:
    """sha256 over the weight files' contents, in the order of their names."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weight files, on the CPU.

    Raises:
        WeightsError: where a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= _read_tensors(file)
    return tensors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    import pickle
    import struct

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (
        *(SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError),
        *(LookupError, TypeError, AttributeError, AssertionError, struct.error),  # of damaged pickles
    ) as error:
        raise WeightsError(f"{file} cannot be read: {error}", "fetch the weights folder again") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"{file} holds something else than tensors.", "fetch the weights folder again")
    return dict(loaded)
