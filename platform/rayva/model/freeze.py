"""Which parameters a stage trains, decided in one place (section 4.2)."""

from __future__ import annotations

import logging
from typing import Literal

from rayva.model.lora import has_adapters, is_adapter
from rayva.model.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)


def apply_freeze_policy(model: VisionLanguageModel, train: Literal["projector", "all"]) -> int:
    """Marks what is trained: W alone (stage 1), or W and the language model (stage 2).

    Where the language model has adapters, they are trained in its place.
    The vision tower is no part of the model: its features are inputs. Returns the trained parameters' number.
    """
    adapted = has_adapters(model.language)
    for name, parameter in model.language.named_parameters():
        parameter.requires_grad_(train == "all" and (is_adapter(name) or not adapted))
    model.projector.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    logger.info("training %s: %d parameters trained, %d frozen", train, trained, frozen)
    return trained
