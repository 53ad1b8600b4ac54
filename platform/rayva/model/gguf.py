"""Turns a GGUF file of a Llama-shaped model into a plain Hugging Face folder.

The weights of a GGUF file are quantised; the folder holds them dequantised, so that training sees
ordinary floating-point parameters and nothing downstream needs the GGUF reader.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rayva.errors import WeightsError

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert_gguf(
    source: Path, target: Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> LlamaConfig:
    """Writes `source` (a .gguf file) as a folder `target` with safetensors weights and the tokenizer.

    Returns the configuration of the written model.

    Raises:
        WeightsError: the file is missing, is no GGUF file, or holds no Llama-shaped model.
    """
    if not source.is_file():
        raise WeightsError(f"no GGUF file at {source}", "give the path of a .gguf file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightsError(f"{source} is not a GGUF file", "download it again; it may be cut short")
    folder, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise WeightsError(
            f"{source} holds a {type(loaded).__name__}, not a Llama model", "convert it with its own tools"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = _fresh_copy(loaded, _DTYPES[dtype])
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    logger.info("wrote %s as a Hugging Face folder to %s", source.name, target)
    return model.config


def _fresh_copy(loaded: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of the same weights without the quantisation mark, which forbids `save_pretrained`."""
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("dtype", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model.to(dtype).eval()
