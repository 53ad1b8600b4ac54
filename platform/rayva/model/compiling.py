"""torch.compile for language models: layer by layer, so that one graph serves all layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def compile_layers(language: PreTrainedModel) -> None:
    """Compiles every layer in place, for rows of any length; where there are none to be found, the whole.

    Layers alike share what is compiled: it takes the time of one layer, not that of the model.
    """
    base, count = language.base_model, language.config.num_hidden_layers
    stacks = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    for module in stacks[0] if stacks else [base]:
        module.compile(dynamic=True)
