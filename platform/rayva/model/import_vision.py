"""The vision tower of an imported checkpoint: stored in it, or a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    Tensors,
    check_part,
    has_weights,
    load_each,
    open_checkpoint,
    read_json,
    renamed,
)
from rayva.model.import_language import count, first_line
from rayva.model.shards import CheckpointWriter, write_json
from rayva.vision.preprocess import Aspect
from rayva.vision.towers import TowerDescription, describe_tower
from rayva.vision.weights import resolve_folder

PREFIX = "vision_model."
_REMEDY = "fetch or save the tower again, or name another folder with --vision"
_TYPES: dict[str, Literal["clip", "siglip"]] = {
    "clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
}  # fmt: skip
_CLASSES = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, "CLIPVisionModel", "CLIPImageProcessor"),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, "SiglipVisionModel", "SiglipImageProcessor"),
}
_COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size",
)  # fmt: skip
_OPTIONAL = (f"{PREFIX}head.",)
"""Parts behind the feature map that some checkpoints leave out."""
_UNUSED = ("position_ids",)
_DROPPED = (
    "_", "architectures", "auto_map", "attn_implementation", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip
"""Beginnings of config keys that are written anew, or that could name code."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_KNOWN = re.compile(r"(?:.*/)?clip-vit-large-patch14(?:-336)?/?")
"""OpenAI's CLIP ViT-L/14, which all of LLaVA v0 to 1.5 look through."""


@dataclass(frozen=True)
class VisionPart:
    """A vision transformer, described but not read yet.

    Attributes:
        config: its own config.json (not that of a whole image-text model), found in `config_file`.
        processor: how pictures are prepared, found in `processor_file`.
        tensors: by the names `vision_model.*`.
        where: names the weight files in complaints.
    """

    kind: Literal["clip", "siglip"]
    config: dict[str, Any]
    config_file: Path
    processor: dict[str, Any]
    processor_file: Path
    tensors: Tensors
    where: str


def tower_folder(checkpoint: Path, named: object, given: Path | None, stored: bool) -> Path | None:
    """The folder of the tower that a checkpoint names in `mm_vision_tower`, or that a person gave.

    None where the checkpoint holds the tower's tensors itself, and its shape is known without a folder.

    Raises:
        WeightsError: there is no such folder, and no such name on the Hugging Face hub.
    """
    if given is not None:
        if not given.is_dir():
            raise WeightsError(f"there is no vision tower folder {given}", "give --vision a folder")
        return given
    if not isinstance(named, str) or not named:
        raise WeightsError(
            f"{checkpoint / 'config.json'}: mm_vision_tower is {named!r}, which names no vision tower",
            "give the tower's folder with --vision",
        )
    for folder in (checkpoint / named, Path(named)):
        with suppress(OSError):  # a name that is too long for any file
            if folder.is_dir():
                return folder
    if stored and _KNOWN.fullmatch(named):
        return None
    if not _HUB_NAME.fullmatch(named):
        raise WeightsError(
            f"{checkpoint / 'config.json'}: mm_vision_tower {named!r} is no folder, neither seen from the "
            "checkpoint nor from here",
            "give the tower's folder with --vision",
        )
    return resolve_folder(named)


def known_tower(named: str, tensors: Tensors, where: Path) -> VisionPart:
    """CLIP ViT-L/14 by its name, for a checkpoint that holds its tensors but not its description."""
    side = 336 if "336" in named.rpartition("patch14")[2] else 224
    config = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": side, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    processor = {
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    return VisionPart("clip", config, where, processor, where, tensors, str(where.parent))


def tower_of_folder(folder: Path, tensors: Tensors | None) -> VisionPart:
    """A tower by its folder; `tensors` takes the place of its weights where a checkpoint has its own.

    Raises:
        WeightsError: no CLIP or SigLIP, or a file that is missing or damaged.
    """
    file = folder / "config.json"
    processor, processor_file = processor_of(folder)
    where = "the checkpoint"
    if tensors is None:
        if not has_weights(folder):
            raise WeightsError(
                f"neither the checkpoint nor {folder} holds the vision tower's weights", _REMEDY
            )
        stored = open_checkpoint(folder)
        whole = any(name.startswith(PREFIX) for name in stored)
        tensors = renamed(
            stored, lambda name: (name if name.startswith(PREFIX) else None) if whole else PREFIX + name
        )
        where = str(folder)
    return vision_part(read_json(file), file, processor, processor_file, tensors, where)


def processor_of(folder: Path) -> tuple[dict[str, Any], Path]:
    """How pictures are prepared, according to `folder`, and the file that says so."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return read_json(file), file
    file = folder / "processor_config.json"
    if file.is_file():
        inner = read_json(file).get("image_processor")
        if isinstance(inner, dict):
            return inner, file
        raise WeightsError(f"{file}: image_processor is missing", _REMEDY)
    raise WeightsError(
        f"{folder} does not say how pictures are prepared (no preprocessor_config.json)",
        "copy that file from the original tower, or name its folder with --vision",
    )


def vision_part(
    raw: Mapping[str, Any],
    file: Path,
    processor: Mapping[str, Any],
    processor_file: Path,
    tensors: Tensors,
    where: str,
) -> VisionPart:
    """Picks the vision model out of a tower's config.json, which may be that of an image-text model."""
    kind = _TYPES.get(str(raw.get("model_type")))
    if kind is None:
        raise WeightsError(
            f"{file}: model_type is {raw.get('model_type')!r}, expected CLIP or SigLIP",
            "only these towers can be imported",
        )
    config = raw.get("vision_config", raw)
    if not isinstance(config, dict):
        raise WeightsError(f"{file}: vision_config is {config!r}, expected an object", _REMEDY)
    config = {key: value for key, value in config.items() if not key.startswith(_DROPPED)}
    config["model_type"] = f"{kind}_vision_model"
    for key in _COUNTS:
        if key in config:
            count(config, key, file)
    return VisionPart(kind, config, file, dict(processor), processor_file, tensors, where)


def check_vision(part: VisionPart) -> VisionPart:
    """Checks every tensor against the architecture; settings that were left out get their values.

    Raises:
        WeightsError: a tensor that is missing, unknown, or of another shape or precision.
    """
    make_config, make_model, name, _ = _CLASSES[part.kind]
    if part.config.get("num_hidden_layers", 0) > max(len(part.tensors), 1024):
        raise WeightsError(
            f"{part.config_file}: num_hidden_layers is {part.config['num_hidden_layers']}, "
            f"but {part.where} holds {len(part.tensors)} tensors of the vision tower",
            _REMEDY,
        )
    try:
        config = make_config(**{key: value for key, value in part.config.items() if key != "model_type"})
        with torch.device("meta"):
            model = make_model(config)
    except Exception as error:  # the library's checks, and what they overlook, fail in many ways
        raise WeightsError(
            f"{part.config_file} describes no vision tower that can be built: {first_line(error)}", _REMEDY
        ) from error
    tensors = {name: tensor for name, tensor in part.tensors.items() if not name.endswith(_UNUSED)}
    expected = {
        PREFIX + key.removeprefix(PREFIX): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if not key.endswith(_UNUSED)
    }
    if not any(key.startswith(_OPTIONAL) for key in tensors):
        expected = {key: shape for key, shape in expected.items() if not key.startswith(_OPTIONAL)}
    check_part("vision tower", tensors, expected, part.where, str(part.config_file))
    settings = {key: getattr(config, key) for key in (*_COUNTS, "hidden_act", "layer_norm_eps")}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return replace(
        part,
        tensors=tensors,
        config={**part.config, **settings, "architectures": [name], "dtype": dtype},
    )


def write_vision(part: VisionPart, target: Path, layer: int, aspect: Aspect) -> TowerDescription:
    """Writes the tower's folder and reads back what it is.

    Raises:
        WeightsError: pictures are prepared in a way that is not supported, or not for this tower.
    """
    write_json(target / "config.json", part.config)
    write_json(target / "preprocessor_config.json", _plain_processor(part))
    writer = CheckpointWriter(target)
    writer.add(load_each(part.tensors, "vision tower"))
    writer.finish()
    try:
        tower = describe_tower(str(target), part.kind, layer, None, aspect)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise WeightsError(
            f"{part.processor_file} does not say how pictures are prepared: {first_line(error)}", _REMEDY
        ) from error
    except WeightsError as error:
        here = str(target)
        what = error.what.replace(f"{here}/preprocessor_config.json", str(part.processor_file))
        raise WeightsError(what.replace(here, part.where), error.remedy) from error
    made_for = count(part.config, "image_size", part.config_file)
    if tower.spec.preprocessing.image_size != made_for:
        raise WeightsError(
            f"{part.processor_file} prepares pictures of {tower.spec.preprocessing.image_size} pixels, "
            f"but {part.config_file} describes a tower for {made_for} (image_size)",
            _REMEDY,
        )
    return tower


def wants_padding(processor: Mapping[str, Any]) -> bool:
    """Whether an image processor pads to a square first (Hugging Face's LlavaImageProcessor)."""
    return bool(processor.get("do_pad")) and "Llava" in str(processor.get("image_processor_type"))


def _plain_processor(part: VisionPart) -> dict[str, Any]:
    """The tower's own image processor; padding to a square is a setting of its own in Rayva."""
    dropped = ("processor_class", "auto_map", "feature_extractor_type", "do_pad", "_valid_processor_keys")
    plain = {key: value for key, value in part.processor.items() if key not in dropped}
    plain["image_processor_type"] = _CLASSES[part.kind][3]
    if wants_padding(part.processor):
        size, crop = part.processor.get("size"), part.processor.get("crop_size")
        side = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
        cropped = crop and part.processor.get("do_center_crop", True)
        plain["size"] = {"shortest_edge": side}
        plain["crop_size"] = crop if cropped else {"height": side, "width": side}
        plain["do_center_crop"] = True
    return plain
