"""Where a language model keeps its layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def layers_of(language: PreTrainedModel) -> list[nn.Module]:
    """The layers, the first one first; none where there is no list of as many modules as the config says."""
    base, count = language.base_model, language.config.num_hidden_layers
    stacks = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return list(stacks[0]) if stacks else []
