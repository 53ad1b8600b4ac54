"""Small random towers in the formats of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIDE, PATCH, HIDDEN, LAYERS = 32, 8, 48, 3
_VISION = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def save_tower(kind: str, folder: Path, part: str = "whole", seed: int = 0, side: int = SIDE) -> Any:
    """Saves a random tower as Hugging Face does; `part` is "whole" (image-text) or "vision".

    Returns the vision model, in evaluation mode.
    """
    torch.manual_seed(seed)
    vision = {**_VISION, "image_size": side}
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(vision_config=vision, text_config=_TEXT))
        processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    else:
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=_TEXT))
        processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    with torch.no_grad():  # as initialised, weights are too small for a mistake to show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    (model if part == "whole" else model.vision_model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.vision_model.eval()
