"""The MLP of the language model's last layer, computed only where the loss reads what it gives.

Attention is the one thing that carries information from one position to another, and behind the last
layer's there is none: what the last MLP makes of a position without a label goes nowhere. In stage 1 that
is nine positions in ten.

Shapes: B rows, T positions, S positions that are read, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rayva.model.layers import layers_of


class LastMlp:
    """Within `at`, the last layer's MLP is computed at the positions given and adds zeros to the others."""

    def __init__(self, layer: GradientCheckpointingLayer, mlp: nn.Module) -> None:
        self.layer, self.mlp = layer, mlp
        self._positions_S: Tensor | None = None
        self._size = torch.Size()
        self.is_plain = False
        """Whether the last forward pass outside `at` went from one tensor to another of its shape."""
        self._hooks = [
            mlp.register_forward_pre_hook(self._take),
            mlp.register_forward_hook(self._put, with_kwargs=True),
        ]

    @contextmanager
    def at(self, positions_S: Tensor) -> Iterator[None]:
        """At these positions of the flattened batch [B x T], and only there, hidden states are the model's.

        A forward pass that is repeated during the backward pass would no longer know them: the layer must
        not be under gradient checkpointing (`keep_activations`).
        """
        self._positions_S = positions_S
        try:
            yield
        finally:
            self._positions_S = None

    def keep_activations(self) -> None:
        """Takes the layer out of gradient checkpointing.

        That costs no memory at the peak: the backward pass begins with this layer, whose activations would
        be computed again before any other's could be dropped.
        """
        self.layer.gradient_checkpointing = False

    def remove(self) -> None:
        """Leaves the MLP as it was."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, _: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        if self._positions_S is None:
            return None
        (hidden_BTH,) = args
        self._size = hidden_BTH.shape
        return hidden_BTH.flatten(0, 1).index_select(0, self._positions_S).unsqueeze(0)

    def _put(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._positions_S is None:
            alone = len(args) == 1 and not kwargs
            self.is_plain = alone and isinstance(output, Tensor) and output.shape == args[0].shape
            return None
        zeros_MH = output.new_zeros(self._size).flatten(0, 1)
        return zeros_MH.index_copy(0, self._positions_S, output[0]).view(self._size)


def last_mlp(language: PreTrainedModel) -> LastMlp | None:
    """The last layer's MLP where it stands by that name; whether it may be narrowed is to be tried."""
    layer = next(reversed(layers_of(language)), None)
    mlp = getattr(layer, "mlp", None)
    if isinstance(layer, GradientCheckpointingLayer) and isinstance(mlp, nn.Module):
        return LastMlp(layer, mlp)
    return None
