"""Tiny checkpoints in the layouts of the original LLaVA code, made on the spot, for the tests of import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rayva.model.checkpoint import open_checkpoint
from rayva.model.projector import ProjectorKind, build_projector
from tests.export.tiny_model import HIDDEN, PATCH, SIDE, WIDTH, make_language, make_tokenizer

Layout = Literal["safetensors", "bin", "sharded safetensors", "sharded bin"]


def make_clip(folder: Path) -> CLIPVisionModel:
    """A random CLIP vision model with its image processor, as a folder that `mm_vision_tower` can name."""
    torch.manual_seed(0)
    shape = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH, initializer_factor=2.0,
    )  # fmt: skip
    tower = CLIPVisionModel(shape)
    tower.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    return tower


def clip_tensors(tower: CLIPVisionModel) -> dict[str, Tensor]:
    """The tower's tensors by the names that the original code stores them under."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {prefix + name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()}


def projector_tensors(kind: ProjectorKind, seed: int = 2) -> dict[str, Tensor]:
    """A random projector by the original's names."""
    torch.manual_seed(seed)
    state = build_projector(kind, HIDDEN, WIDTH).state_dict()
    return {f"model.mm_projector.{name}": tensor.clone() for name, tensor in state.items()}


def original_config(language: LlamaForCausalLM, kind: ProjectorKind, **changes: Any) -> dict[str, Any]:
    """config.json as the original's transformers (4.31 to 4.37) writes it."""
    own = language.config.to_dict()
    for key in ("rope_parameters", "dtype", "architectures", "transformers_version"):
        own.pop(key, None)
    return (
        own
        | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "mm_vision_tower": "../tower",
            "mm_hidden_size": HIDDEN,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": kind,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
        | changes
    )


def save_weights(folder: Path, tensors: dict[str, Tensor], layout: Layout = "bin") -> None:
    """Writes a checkpoint's weights, whole or in two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    safe = layout.endswith("safetensors")
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names = sorted(tensors)
    shards = [names[::2], names[1::2]] if layout.startswith("sharded") else [names]
    places = {}
    for number, own in enumerate(shards, start=1):
        file = f"{stem}.{suffix}" if len(shards) == 1 else f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in own}
        if safe:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        places.update(dict.fromkeys(own, file))
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_original(
    root: Path,
    *,
    kind: ProjectorKind = "linear",
    layout: Layout = "bin",
    stores_tower: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **config: Any,
) -> tuple[Path, dict[str, Tensor]]:
    """`root`/checkpoint, a full checkpoint of the original code, with its tensors; and `root`/tower."""
    tower = make_clip(root / "tower")
    tokenizer = tokenizer or make_tokenizer()
    language = make_language(len(tokenizer))
    tensors = dict(language.state_dict()) | projector_tensors(kind)
    if stores_tower:
        tensors |= clip_tensors(tower)
    folder = root / "checkpoint"
    save_weights(folder, tensors, layout)
    write_config(folder, original_config(language, kind, **config))
    tokenizer.save_pretrained(folder)
    return folder, tensors


def stored(folder: Path) -> dict[str, Tensor]:
    """All weights of a model folder."""
    parts = {name: open_checkpoint(folder / name) for name in ("language", "vision")}
    tensors = {f"{part}.{n}": t.load() for part, own in parts.items() for n, t in own.items()}
    projector = load_file(folder / "projector.safetensors")
    return tensors | {f"projector.{name}": tensor for name, tensor in projector.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit, names and precision included."""
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
