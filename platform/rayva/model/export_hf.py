"""Exports a Rayva model folder as a Hugging Face LLaVA checkpoint.

The names on disk are those of the public LLaVA checkpoints (`vision_tower.vision_model.*`,
`language_model.model.*`, `language_model.lm_head.*`, `multi_modal_projector.linear_{1,2}.*`), which
transformers and vLLM both read. Every tensor keeps its stored precision.

Shapes: B rows, T positions, V vocabulary of the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from rayva.errors import WeightsError
from rayva.model.checkpoint import load_each, open_checkpoint, read_json
from rayva.model.export_hf_chat import chat_template
from rayva.model.export_hf_check import check_export
from rayva.model.export_llava import projector_tensors
from rayva.model.folder import ModelSettings, VisionSettings
from rayva.model.language import load_tokenizer
from rayva.model.shards import CheckpointWriter, fresh_folder
from rayva.vision.architecture import TowerSpec, read_spec
from rayva.vision.preprocess import Preprocessing
from rayva.vision.weights import load_tensors

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def vllm_overrides(exported: Path) -> dict[str, str]:
    """What vLLM's `--hf-overrides` has to say for an exported folder.

    transformers calls the identity between the layers of a linear projector `linear`; vLLM (0.32) knows it
    only by another name, which transformers does not know.
    """
    linear = read_json(exported / "config.json").get("projector_hidden_act") == "linear"
    return {"projector_hidden_act": "torch.nn.modules.linear.Identity"} if linear else {}


def has_hf_class(settings: ModelSettings) -> bool:
    """Whether Hugging Face's LLaVA can hold this vision tower."""
    return settings.vision.kind in ("clip", "siglip")


def export_hf(source: Path, target: Path) -> float:
    """Writes `target` and returns the largest difference of its logits from the source's (fp32).

    Raises:
        WeightsError: the model has no Hugging Face form, `target` exists, or the logits differ.
    """
    settings = ModelSettings.read(source)
    if not has_hf_class(settings):
        raise WeightsError(
            f"Hugging Face's LLaVA has no {settings.vision.kind} vision tower",
            "use the Rayva folder as it is",
        )
    spec = _read_spec(source, settings.vision)
    with fresh_folder(target) as scratch:
        tokenizer = _tokenizer(source, settings)
        rows = _vocabulary_rows(source / "language", tokenizer)
        _write_weights(source, scratch, settings, rows)
        _config(source, settings, tokenizer, rows).save_pretrained(scratch)
        _processor(source, settings, spec, tokenizer).save_pretrained(scratch)
        _generation_config(source, settings, tokenizer, rows).save_pretrained(scratch)
        return check_export(source, scratch)


def export_rayva(source: Path, target: Path) -> None:
    """Copies the self-contained Rayva folder, for towers without a Hugging Face LLaVA class."""
    with fresh_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)


def _read_spec(source: Path, vision: VisionSettings) -> TowerSpec:
    """The tower's shape and preprocessing, where Hugging Face's class computes the same."""
    spec = read_spec(source / "vision", vision.kind, vision.layer, vision.image_size, vision.aspect)
    side, made_for = spec.preprocessing.image_size, spec.architecture and spec.architecture.image_size
    if side != made_for:
        raise WeightsError(
            f"the model was trained with {side}-pixel pictures, its tower is made for {made_for}",
            "Hugging Face's LLaVA does not interpolate positions; use the Rayva folder as it is",
        )
    return spec


def _vision_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors by their names in the export, from a whole CLIP or from its vision part."""
    tensors = load_tensors(folder)
    inner = "vision_model."
    whole = any(name.startswith(inner) for name in tensors)
    for name, tensor in tensors.items():
        if name.startswith(inner) == whole and not name.endswith("position_ids"):
            yield f"vision_tower.{inner}{name.removeprefix(inner)}", tensor


def _tokenizer(source: Path, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the image token, a padding token and the chat template."""
    tokenizer = load_tokenizer(str(source / "language"))
    conversation = settings.conversation
    tokenizer.chat_template = chat_template(
        conversation.build(tokenizer), tokenizer, conversation.system, conversation.image_markers
    )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _vocabulary_rows(language: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embedding: enough for every token, and a multiple of 64."""
    table = open_checkpoint(language).get(_EMBEDDING)
    if table is None:
        raise WeightsError(
            f"{language} holds no tensor {_EMBEDDING}", "its architecture cannot be exported to LLaVA"
        )
    rows = max(table.shape[0], len(tokenizer))
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _write_weights(source: Path, target: Path, settings: ModelSettings, rows: int) -> None:
    tied = bool(read_json(source / "language" / "config.json").get("tie_word_embeddings", False))
    writer = CheckpointWriter(target)
    writer.add(_language_tensors(source / "language", rows, tied))
    writer.flush()
    writer.add(_vision_tensors(source / "vision"))
    writer.add(_projector(source, settings))
    writer.finish()


def _language_tensors(folder: Path, rows: int, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors by their names in the export. A tied LM head is written out."""
    stored = open_checkpoint(folder)
    for name, described in stored.items():
        if not name.startswith("model.") and name != _HEAD:
            raise WeightsError(
                f"{described.where}: unexpected tensor", "its architecture cannot be exported to LLaVA"
            )
    if tied:
        stored.pop(_HEAD, None)
    for name, weight in load_each(stored, "language model"):
        tensor = _padded(weight, rows) if name in (_EMBEDDING, _HEAD) else weight
        if name == _EMBEDDING and tied:
            yield f"language_model.{_HEAD}", tensor.clone()
        yield f"language_model.{name}", tensor


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` [V, H] with its mean row appended up to `rows`.

    The mean row's logit is the mean of all logits, so an added token is never the likeliest.
    """
    missing = rows - tensor.shape[0]
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, -1)])


def _projector(source: Path, settings: ModelSettings) -> Iterator[tuple[str, Tensor]]:
    """`linear_1` and `linear_2`; a linear W becomes linear_1 = W, identity activation, linear_2 = I."""
    names = {"weight": "linear_1.weight", "bias": "linear_1.bias"}
    if settings.projector == "mlp2x_gelu":
        names = {
            f"{index}.{part}": f"linear_{place}.{part}" for index, place in ((0, 1), (2, 2)) for part in names
        }
    tensors = projector_tensors(source)
    for name, tensor in tensors.items():
        yield "multi_modal_projector." + names[name.removeprefix("model.mm_projector.")], tensor
    if settings.projector == "linear":
        weight = tensors["model.mm_projector.weight"]
        width = weight.shape[0]
        yield "multi_modal_projector.linear_2.weight", torch.eye(width, dtype=weight.dtype)
        yield "multi_modal_projector.linear_2.bias", torch.zeros(width, dtype=weight.dtype)


def _config(
    source: Path, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, rows: int
) -> LlavaConfig:
    vision = AutoConfig.from_pretrained(source / "vision")
    text = AutoConfig.from_pretrained(source / "language")
    text.vocab_size, text.tie_word_embeddings = rows, False
    text._name_or_path = ""  # a path of this machine has no place in a file for others
    config = LlavaConfig(
        vision_config=getattr(vision, "vision_config", vision),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=settings.vision.tokens,
        projector_hidden_act="linear" if settings.projector == "linear" else "gelu",
        vision_feature_select_strategy=_strategy(settings.vision),
        vision_feature_layer=settings.vision.layer,
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = text.dtype
    return config


def _strategy(vision: VisionSettings) -> str:
    """`default` drops the class token, which CLIP has and SigLIP has not."""
    return "default" if vision.kind == "clip" else "full"


def _processor(
    source: Path, settings: ModelSettings, spec: TowerSpec, tokenizer: PreTrainedTokenizerBase
) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=_image_processor(source / "vision", spec.preprocessing),
        tokenizer=tokenizer,
        patch_size=spec.architecture and spec.architecture.patch_size,
        vision_feature_select_strategy=_strategy(settings.vision),
        num_additional_image_tokens=1 if settings.vision.kind == "clip" else 0,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def _image_processor(folder: Path, preprocessing: Preprocessing) -> Any:
    side = {"height": preprocessing.image_size, "width": preprocessing.image_size}
    if preprocessing.aspect == "pad":
        uncropped = preprocessing.resize_to == preprocessing.image_size
        return LlavaImageProcessorPil(
            do_pad=True,
            size=side if uncropped else {"shortest_edge": preprocessing.resize_to},
            crop_size=side,
            resample=preprocessing.resample,
            rescale_factor=preprocessing.rescale,
            image_mean=list(preprocessing.mean),
            image_std=list(preprocessing.std),
        )
    if preprocessing.stretch:
        return AutoImageProcessor.from_pretrained(folder, size=side)
    shorter = {"shortest_edge": preprocessing.resize_to}
    return AutoImageProcessor.from_pretrained(folder, size=shorter, crop_size=side)


def _generation_config(
    source: Path, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, rows: int
) -> GenerationConfig:
    """Greedy, ending where the model was trained to end; tokens without a meaning are never generated.

    A stop string that is no single control token (`###` of v0) has no place in this file.
    """
    file = source / "language" / "generation_config.json"
    known = read_json(file).get("eos_token_id") if file.is_file() else None
    ends = {known} if isinstance(known, int) else set(known or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    for stop in settings.conversation.build(tokenizer).stop:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in tokenizer.all_special_ids:
            ends.add(ids[0])
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image, *range(len(tokenizer), rows)],
    )
