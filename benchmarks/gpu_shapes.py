"""Shapes, FLOPs and peaks for `gpu_step.py`. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lengths import StageName

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0, "H200": 989.4, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0,
    "L40S": 362.0, "A10G": 70.0, "L4": 121.0, "RTX 4090": 165.2,
}  # fmt: skip
"""Dense bf16 with fp32 accumulation, by a part of the device's name; the first that fits counts."""

HOURS: dict[StageName, float] = {"pretrain": 595_000, "finetune": 3 * 158_000}
"""Samples of the paper's stages, repetitions counted (section 4.2 and appendix)."""


def peak_of(name: str) -> float | None:
    """Peak of a device in TFLOP/s; None where it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Shape:
    """A language model of Llama's kind, and the features that its projector takes."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    image_tokens: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def parameters(self, depth: int) -> int:
        """Parameters of the language model with `depth` layers; norms left out."""
        return depth * self.layer_parameters + 2 * self.vocabulary * self.hidden

    def flops(
        self, stage: StageName, depth: int, lengths: Sequence[int], supervised: int, images: int
    ) -> float:
        """FLOPs of a step over samples of these lengths, as the docstring of `gpu_step.py` counts them."""
        each = 4 if stage == "pretrain" else 6
        dense = each * depth * self.layer_parameters * sum(lengths)
        head = each * self.vocabulary * self.hidden * supervised
        projector = 4 * self.vision_hidden * self.hidden * images * self.image_tokens
        attention = 6 * depth * self.hidden * sum(length**2 for length in lengths)
        return float(dense + head + projector + attention)


SHAPES: dict[str, Shape] = {
    "7b": Shape(32000, 4096, 11008, 32, 32, 32, 1024, 256),
    "13b": Shape(32000, 5120, 13824, 40, 40, 40, 1024, 256),
    "tiny": Shape(512, 64, 128, 3, 4, 2, 32, 16),
}
