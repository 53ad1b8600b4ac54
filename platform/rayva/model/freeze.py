"""Which parameters a stage trains, decided in one place (section 4.2)."""

from __future__ import annotations

import logging
from typing import Literal

from rayva.model.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA adapter."""
    return ".lora_A." in name or ".lora_B." in name


def apply_freeze_policy(model: VisionLanguageModel, train: Literal["projector", "all"]) -> int:
    """Marks what is trained: W alone (stage 1), or W and the language model (stage 2).

    Where the language model has adapters, they are trained in its place.
    The vision tower is no part of the model: its features are inputs. Returns the trained parameters' number.
    """
    parameters = list(model.language.named_parameters())
    adapted = any(is_adapter(name) for name, _ in parameters)
    for name, parameter in parameters:
        parameter.requires_grad_(train == "all" and (is_adapter(name) or not adapted))
    model.projector.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    logger.info("training %s: %d parameters trained, %d frozen", train, trained, frozen)
    return trained
