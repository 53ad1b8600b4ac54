"""Floating-point operations that a step's arithmetic needs, and what devices can do at most.

Counted is what the model needs, twice for each product: forward, the gradient of activations, and that of
trained weights; attention over the pairs that causality leaves, softmax and norms not. What is computed
again (gradient checkpointing), padding, and optimizers do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from rayva.model.vlm import VisionLanguageModel

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0, "H200": 989.4, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0,
    "A800": 312.0, "H800": 989.4, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0,
    "A6000": 155.0, "V100": 125.0, "T4": 65.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense half-precision peaks with fp32 sums from the makers' data sheets, by a part of the device's name;
the first that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """A device's peak in operations a second; None where it is not known, as for CPUs and in fp32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The table's peak for a device's name, in operations a second."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next((peak * 1e12 for peak in found), None)


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations by what they grow with."""

    token: float
    supervised: float
    image_token: float
    pair: float
    """A pair of positions of one sample, seen as a square: half of them are masked."""

    @classmethod
    def of(cls, model: VisionLanguageModel) -> ModelFlops:
        """Counts a model whose parameters are whole and marked as trained or frozen."""
        language, head = model.language, model.language.get_output_embeddings()
        ends = {id(language.get_input_embeddings().weight), id(head.weight)}
        config = language.config
        experts = _share_of_experts(config)
        layers = [
            (p, experts if ".experts." in name else 1.0)
            for name, p in language.named_parameters()
            if p.ndim >= 2 and id(p) not in ends
        ]
        # The last layer's MLP may be computed where there are labels alone.
        narrowed = {id(p) for p in model.last_mlp.mlp.parameters()} if model.last_mlp else set()
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        projector = [p for p in model.projector.parameters() if p.ndim >= 2]
        # The first matrix of the projector needs no gradient of its input; the others' are left out, too.
        return cls(
            token=_products([one for one in layers if id(one[0]) not in narrowed]),
            supervised=_products([(head.weight, 1.0), *(one for one in layers if id(one[0]) in narrowed)]),
            image_token=2.0 * sum(p.numel() * (1 + p.requires_grad) for p in projector),
            pair=6.0 * config.num_hidden_layers * width,
        )

    def step(self, lengths: Sequence[int], supervised: int, image_tokens: int) -> float:
        """Operations of a step over samples of these lengths."""
        pairs = sum(length * length for length in lengths)
        return (
            self.token * sum(lengths)
            + self.supervised * supervised
            + self.image_token * image_tokens
            + self.pair * pairs
        )


def _products(weights: Sequence[tuple[nn.Parameter, float]]) -> float:
    """Operations for one position: forward, the gradient of its activations, that of trained weights."""
    return 2.0 * sum(p.numel() * share * (2 + p.requires_grad) for p, share in weights)


def _share_of_experts(config: PretrainedConfig) -> float:
    """Which part of a layer's experts a token goes through."""
    counts = (
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    number = next((count for count in counts if count), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / number if used and number else 1.0
