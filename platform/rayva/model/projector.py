"""The projection W of equation 1: visual features Z_v to language tokens H_v = W Z_v (section 4.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rayva.errors import WeightsError

ProjectorKind = Literal["linear", "mlp2x_gelu"]


def build_projector(kind: ProjectorKind, vision_hidden: int, text_hidden: int) -> nn.Module:
    """A projector from [*, vision_hidden] to [*, text_hidden], freshly initialised.

    `linear` is the paper's W (with the bias that the released code has); `mlp2x_gelu` is LLaVA-1.5's.
    """
    if kind == "linear":
        return nn.Linear(vision_hidden, text_hidden)
    return nn.Sequential(
        nn.Linear(vision_hidden, text_hidden), nn.GELU(), nn.Linear(text_hidden, text_hidden)
    )


def load_projector(projector: nn.Module, path: Path) -> None:
    """Fills `projector` from a safetensors file; a file that does not fit is a `WeightsError`."""
    remedy = "Give the projector that was trained for this vision tower, language model and projector kind."
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The projector file {path} cannot be read: {error}", remedy) from error
    own = projector.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise WeightsError(
            f"The projector file {path} does not fit: it holds {found}, expected {expected}", remedy
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
