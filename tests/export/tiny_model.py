"""A tiny random CLIP + Llama model folder, made in a second, for the tests of export and serving."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rayva.model.folder import ConversationSettings, ModelSettings, VisionSettings
from rayva.model.projector import ProjectorKind, build_projector
from rayva.vision.towers import describe_tower

SIDE, PATCH, HIDDEN, WIDTH, CONTEXT = 28, 7, 32, 48, 512
_TEXT = [
    "a large red circle is left of a small blue square",
    "What colour is the circle? Where is the square? What is in the picture?",
    "USER: ASSISTANT: Human: Assistant: system user assistant [INST] [/INST]",
    "A chat between a curious user and an artificial intelligence assistant.",
]


def make_tokenizer(chatml: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one that adds BOS, or one with ChatML's markers that adds nothing."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"] + (["<|im_start|>", "<|im_end|>"] if chatml else [])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(_TEXT, trainer)
    if not chatml:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_language(vocabulary: int, tied: bool = False) -> LlamaForCausalLM:
    """Two random layers; large enough weights that pictures and questions change the answer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_tower(folder: Path) -> None:
    """A random CLIP with its image processor, saved as Hugging Face saves it."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)


def make_model_folder(
    folder: Path,
    *,
    template: str = "v1",
    projector: ProjectorKind = "linear",
    aspect: Literal["square", "pad"] = "square",
    tied: bool = False,
) -> Path:
    """Writes `folder`/model with everything in it, and returns that path."""
    tower = folder / "tower"
    make_tower(tower)
    description = describe_tower(str(tower), "clip", -2, SIDE, aspect)
    tokenizer = make_tokenizer(chatml=template == "chatml")
    torch.manual_seed(2)
    settings = ModelSettings(
        vision=VisionSettings(
            kind="clip",
            layer=-2,
            image_size=SIDE,
            aspect=aspect,
            tokens=description.num_tokens,
            hidden=description.hidden_size,
            digest=description.digest,
        ),
        conversation=ConversationSettings(template=template, system=None),
        projector=projector,
    )
    model = folder / "model"
    make_language(len(tokenizer), tied).save_pretrained(model / "language")
    tokenizer.save_pretrained(model / "language")
    save_file(build_projector(projector, HIDDEN, WIDTH).state_dict(), model / "projector.safetensors")
    shutil.copytree(tower, model / "vision")
    settings.write(model)
    return model
