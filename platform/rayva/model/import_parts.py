"""What every kind of checkpoint is taken apart into before a model folder is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    Tensors,
    files_of,
    stored_name,
)
from rayva.model.folder import ConversationSettings
from rayva.model.import_language import (
    LanguagePart,
)
from rayva.model.import_vision import (
    VisionPart,
)
from rayva.model.projector import ProjectorKind
from rayva.vision.preprocess import Aspect

Kind = Literal["original", "lora", "projector", "hf"]
REMEDY = "fetch or save the checkpoint again"
PROJECTOR = "mm_projector."
PROJECTOR_NAMES: dict[ProjectorKind, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "mlp2x_gelu": ("0.weight", "0.bias", "2.weight", "2.bias"),
}


@dataclass(frozen=True)
class Choices:
    """What a person said beside the checkpoint; None leaves it to the checkpoint."""

    language: Path | None = None
    vision: Path | None = None
    tokenizer: Path | None = None
    template: str | None = None
    system: str | None = None
    aspect: Aspect | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart, nothing of it read yet.

    `projector` is by the names in projector.safetensors. `conversation` is asked once the tokenizer is
    known. `markers` are tokens around each image, `marker_embedding` the table that holds their trained
    rows. `added` are tokens that the tokenizer is given before them.
    """

    kind: Kind
    language: LanguagePart
    vision: VisionPart
    projector: Tensors
    tokenizer: Path
    generation: dict[str, Any]
    layer: int
    aspect: Aspect
    where: str
    config_file: Path
    conversation: Callable[[PreTrainedTokenizerBase], tuple[ConversationSettings | None, str]]
    markers: tuple[str, str] | None = None
    marker_embedding: Tensor | None = None
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def projector_kind(projector: Tensors, where: str) -> ProjectorKind:
    """The kind whose tensors these are.

    Raises:
        WeightsError: none, or some are missing.
    """
    if not projector:
        raise WeightsError(f"{where} lacks the projector (model.mm_projector.weight, ...)", REMEDY)
    kind: ProjectorKind = "linear" if {"weight", "bias"} & set(projector) else "mlp2x_gelu"
    for name in PROJECTOR_NAMES[kind]:
        if name not in projector:
            raise WeightsError(
                f"{files_of(projector, where)} lacks {stored_name(projector, name)} of the {kind} projector",
                REMEDY,
            )
    for name, tensor in projector.items():
        if name not in PROJECTOR_NAMES[kind]:
            raise WeightsError(f"{tensor.where} is no part of a {kind} projector", REMEDY)
    return kind


def layer_of(raw: Mapping[str, Any], key: str, file: Path) -> int:
    layer = raw.get(key, -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise WeightsError(f"{file}: {key} is {layer!r}, expected one layer's number", REMEDY)
    return layer


def refuse_unused(given: Path | None, option: str, why: str) -> None:
    if given is not None:
        raise WeightsError(f"{option} {given} is of no use: the checkpoint {why}", f"leave {option} out")
