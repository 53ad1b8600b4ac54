"""Writes models for other programs: shared parts, the original LLaVA layout, the projector alone.

An export is written beside its target and renamed when it is finished and checked, so that a folder
that exists is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.folder import ModelSettings
from rayva.model.projector import ProjectorKind

_MODEL_TYPES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
"""Language models that the original code has a LLaVA class for."""


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` at the end, or vanishes on an error.

    Raises:
        WeightsError: `target` exists already.
    """
    if target.exists():
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in order."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no safetensors weights", "save the model with save_pretrained")
    return files


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, one at a time, as they are stored."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - the handle is no mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}", "restore the model folder") from error


class ShardWriter:
    """Writes a sharded checkpoint: one file for each `add`, then the index that names them."""

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder, self._shards = folder, shards
        self._written = 0
        self._places: dict[str, str] = {}
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next shard."""
        self._written += 1
        name = f"model-{self._written:05d}-of-{self._shards:05d}.safetensors"
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        _save(whole, self._folder / name)
        self._places.update(dict.fromkeys(whole, name))
        self._bytes += sum(tensor.nbytes for tensor in whole.values())

    def finish(self) -> None:
        """Writes the index."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._places.items()))}
        write_json(self._folder / "model.safetensors.index.json", index)


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


def projector_tensors(folder: Path) -> dict[str, Tensor]:
    """The projector's tensors by their names in the original code: `model.mm_projector.*`."""
    try:
        tensors = load_file(folder / "projector.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"the projector in {folder} cannot be read: {error}", "restore the folder"
        ) from error
    return {f"model.mm_projector.{name}": tensor for name, tensor in tensors.items()}


def export_projector(source: Path, target: Path) -> None:
    """Writes `target`/mm_projector.bin (as the original's stage 1 does) and the same as safetensors.

    The file is a torch archive of plain tensors: `torch.load(..., weights_only=True)` reads it.
    """
    settings = ModelSettings.read(source)
    with fresh_folder(target) as scratch:
        tensors = projector_tensors(source)
        torch.save(tensors, scratch / "mm_projector.bin")
        save_file(tensors, scratch / "mm_projector.safetensors")
        write_json(scratch / "config.json", _projector_config(settings))


def export_llava(source: Path, target: Path) -> None:
    """Writes the original LLaVA layout: the language model's names, `model.mm_projector.*`, `mm_*` keys.

    The vision tower is a folder of its own there; it is written to `target`/vision_tower.
    """
    settings = ModelSettings.read(source)
    if settings.vision.kind != "clip":
        raise WeightsError(
            f"the original LLaVA has no {settings.vision.kind} vision tower", "export with --format hf"
        )
    config = json.loads((source / "language" / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    if kind not in _MODEL_TYPES:
        raise WeightsError(
            f"the original LLaVA has no class for a {kind} language model", "export with --format hf"
        )
    config |= {"architectures": [_MODEL_TYPES[kind]], "model_type": f"llava_{kind}"}
    config |= _projector_config(settings)
    with fresh_folder(target) as scratch:
        copy_tokenizer(source / "language", scratch)
        shutil.copytree(source / "vision", scratch / "vision_tower")
        write_json(scratch / "config.json", config)
        files = weight_files(source / "language")
        writer = ShardWriter(scratch, len(files) + 1)
        for file in files:
            writer.add(dict(read_tensors(file)))
        writer.add(projector_tensors(source))
        writer.finish()


def copy_tokenizer(language: Path, target: Path) -> None:
    """Copies what is neither weights nor their description: the tokenizer and generation settings."""
    for file in sorted(language.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copy2(file, target / file.name)


def _projector_config(settings: ModelSettings) -> dict[str, object]:
    kind: ProjectorKind = settings.projector
    return {
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": settings.vision.hidden,
        "mm_vision_select_layer": settings.vision.layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": kind,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": settings.vision.aspect,
        "use_mm_proj": True,
    }
