"""torch.compile for language models: layer by layer, so that one graph serves all layers."""

from __future__ import annotations

from transformers import PreTrainedModel

from rayva.model.layers import layers_of


def compile_layers(language: PreTrainedModel) -> None:
    """Compiles every layer in place, for rows of any length; where there are none to be found, the whole.

    Layers alike share what is compiled: it takes the time of one layer, not that of the model.
    """
    for module in layers_of(language) or [language.base_model]:
        module.compile(dynamic=True)
