"""Merges the LoRA weights of an original LLaVA checkpoint into its base language model.

W' = W + scale * B A (arXiv 2106.09685, equation 3) with scale = alpha / r, for W [out, in], A [r, in]
and B [out, r].
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    LazyTensor,
    Tensors,
    check_precision,
    computed,
    open_weights,
    read_json,
    renamed,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = "non_lora_trainables.bin"
_PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_REMEDY = "fetch or save the checkpoint again"
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>.+?)(?:\.modules_to_save)?(?:\.default)?\.(?P<kind>weight|bias)"
)
_TABLES = ("embed_tokens", "lm_head")
"""Modules that peft stores whole with an adapter of its own accord, where it finds them resized."""
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens")


def is_lora(folder: Path) -> bool:
    """Whether `folder` holds LoRA weights."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTERS, OTHERS))


def other_weights(folder: Path) -> Tensors:
    """What was trained in full beside the LoRA weights, by the names of a full checkpoint.

    The adapter's file goes before non_lora_trainables.bin, as in the original, which loads it last.

    Raises:
        WeightsError: a module that adapter_config.json says is stored whole is in neither file.
    """
    config_file = folder / ADAPTER_CONFIG
    saved = _modules_to_save(read_json(config_file), config_file)
    in_adapter = {n: t for n, t in open_weights(_adapter(folder)).items() if _is_whole(n, saved)}
    others = renamed(open_weights(folder / OTHERS), _own_name) | renamed(in_adapter, _own_name)
    for module in saved:
        if not any(_is_in(name, module) for name in others):
            raise WeightsError(
                f"{config_file}: modules_to_save names {module}, which neither {_adapter(folder).name} nor "
                f"{OTHERS} holds",
                _REMEDY,
            )
    return others


def merge(folder: Path, base: Tensors) -> Tensors:
    """`base` with the LoRA weights of `folder` added, in the base's precision.

    Raises:
        WeightsError: a kind of adapter that is not plain LoRA, or one that does not fit the base.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    rank, scale = _settings(config, folder / ADAPTER_CONFIG)
    saved = _modules_to_save(config, folder / ADAPTER_CONFIG)
    file = _adapter(folder)
    tensors = {name: tensor for name, tensor in open_weights(file).items() if not _is_whole(name, saved)}
    check_precision("adapter", tensors.values())
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise WeightsError(f"{tensor.where} is no LoRA weight (lora_A or lora_B)", _REMEDY)
        pairs.setdefault(found["module"], {})[found["side"]] = tensor
    merged = dict(base)
    for module, sides in pairs.items():
        name = f"{module}.weight"
        some = next(iter(sides.values()))
        if name not in base:
            raise WeightsError(
                f"{some.where} changes {name}, which the base model lacks", "give its own base"
            )
        if set(sides) != {"A", "B"}:
            lost = ({"A", "B"} - set(sides)).pop()
            raise WeightsError(f"{file} lacks {_PREFIX}{module}.lora_{lost}.weight", _REMEDY)
        merged[name] = _merged(base[name], sides["A"], sides["B"], rank, scale)
    if not pairs:
        raise WeightsError(f"{file} holds no LoRA weights", _REMEDY)
    return merged


def _adapter(folder: Path) -> Path:
    return next((folder / name for name in ADAPTERS if (folder / name).is_file()), folder / ADAPTERS[1])


def _modules_to_save(config: dict[str, Any], file: Path) -> tuple[str, ...]:
    """Names of the modules that were trained in full and stored with the adapter."""
    found = config.get("modules_to_save") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise WeightsError(f"{file}: modules_to_save is {found!r}, expected names of modules", _REMEDY)
    return tuple(found)


def _is_whole(name: str, saved: tuple[str, ...]) -> bool:
    """Whether the adapter's tensor `name` is a module's own weight, not a change of it."""
    found = _WHOLE.fullmatch(name)
    if found is None or _NAME.fullmatch(name):
        return False
    return any(_is_in(found["module"], module) for module in (*saved, *_TABLES))


def _is_in(path: str, module: str) -> bool:
    return f".{module}." in f".{path}."


def _own_name(name: str) -> str:
    found = _WHOLE.fullmatch(name)
    return f"{found['module']}.{found['kind']}" if found else name.removeprefix(_PREFIX)


def _settings(config: dict[str, Any], file: Path) -> tuple[int, float]:
    """Rank and scale."""
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{file}: peft_type is {config.get('peft_type')!r}, expected LORA", _REMEDY)
    for key in _UNSUPPORTED:
        if config.get(key):
            raise WeightsError(f"{file}: {key} is not supported", "merge the adapter with peft first")
    if config.get("bias", "none") != "none":
        raise WeightsError(f"{file}: bias {config['bias']!r} is not supported", "merge it with peft first")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise WeightsError(f"{file}: r is {rank!r}, expected a positive whole number", _REMEDY)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise WeightsError(f"{file}: lora_alpha is {alpha!r}, expected a number", _REMEDY)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merged(weight: LazyTensor, a: LazyTensor, b: LazyTensor, rank: int, scale: float) -> LazyTensor:
    if len(weight.shape) != 2:
        raise WeightsError(f"{a.where} changes {weight.key}, which is no matrix", _REMEDY)
    out, inner = weight.shape
    for side, shape in ((a, (rank, inner)), (b, (out, rank))):
        if side.shape != shape:
            raise WeightsError(
                f"{side.where} has the shape {list(side.shape)}, expected {list(shape)}", _REMEDY
            )

    def read() -> Tensor:
        change = b.load().float() @ a.load().float()
        original = weight.load()
        return (original.float() + scale * change).to(original.dtype)

    return computed(weight, read)


def overwrite(base: Tensors, own: Tensors) -> Tensors:
    """`base` with the tensors of `own` in their places, in the base's precision."""
    result = dict(base)
    for name, tensor in own.items():
        precision = base[name].dtype if name in base else tensor.dtype
        result[name] = _cast(tensor, precision)
    return result


def _cast(tensor: LazyTensor, dtype: Any) -> LazyTensor:
    if tensor.dtype == dtype or isinstance(dtype, str) or isinstance(tensor.dtype, str):
        return tensor
    return replace(tensor, dtype=dtype, read=lambda: tensor.load().to(dtype))
