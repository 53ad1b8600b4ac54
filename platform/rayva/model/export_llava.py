"""Writes models in the layout of the original LLaVA code, and the projector alone.

An export is written beside its target and renamed when it is finished, so that a folder that exists
is complete.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.checkpoint import load_each, open_checkpoint, read_json
from rayva.model.folder import ModelSettings
from rayva.model.shards import CheckpointWriter, fresh_folder, write_json

_MODEL_TYPES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
"""Language models that the original code has a LLaVA class for."""


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
        write_json(scratch / "config.json", _multimodal_config(settings))


def export_llava(source: Path, target: Path) -> None:
    """Writes the original LLaVA layout: the language model's names, `model.mm_projector.*`, `mm_*` keys.

    The vision tower is a folder of its own there; it is written to `target`/vision_tower.
    """
    settings = ModelSettings.read(source)
    if settings.vision.kind != "clip":
        raise WeightsError(
            f"the original LLaVA has no {settings.vision.kind} vision tower", "export with --format hf"
        )
    config = read_json(source / "language" / "config.json")
    kind = str(config.get("model_type"))
    if kind not in _MODEL_TYPES:
        raise WeightsError(
            f"the original LLaVA has no class for a {kind} language model", "export with --format hf"
        )
    config = older_config(config)
    config |= {"architectures": [_MODEL_TYPES[kind]], "model_type": f"llava_{kind}"}
    config |= _multimodal_config(settings)
    # The original does not record the template; importing the folder again would have to guess it.
    conversation = settings.conversation
    config["rayva_conversation"] = {"template": conversation.template, "system": conversation.system}
    with fresh_folder(target) as scratch:
        _copy_tokenizer(source / "language", scratch)
        shutil.copytree(source / "vision", scratch / "vision_tower")
        write_json(scratch / "config.json", config)
        writer = CheckpointWriter(scratch)
        writer.add(load_each(open_checkpoint(source / "language"), "language model"))
        writer.add(projector_tensors(source))
        writer.finish()


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """A language model's config.json with the keys that the original's transformers (4.31 to 4.37) reads.

    Version 5 writes `rope_parameters` for `rope_theta` and `rope_scaling`, and `dtype` for `torch_dtype`;
    the older one would overlook them and compute other positions.
    """
    config = dict(config)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        kind = scaling.pop("rope_type", "default")
        config["rope_theta"] = rope.get("rope_theta", 10000.0)
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    return config


def _copy_tokenizer(language: Path, target: Path) -> None:
    """Copies what is neither weights nor their description: the tokenizer and generation settings."""
    for file in sorted(language.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copy2(file, target / file.name)


def _multimodal_config(settings: ModelSettings) -> dict[str, object]:
    """What the original keeps in config.json beside the language model's own settings."""
    return {
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": settings.vision.hidden,
        "mm_vision_select_layer": settings.vision.layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": settings.projector,
        "mm_use_im_start_end": settings.conversation.image_markers is not None,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": settings.vision.aspect,
        "use_mm_proj": True,
    }
