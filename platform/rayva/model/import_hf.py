"""Takes apart Hugging Face's LLaVA folders, by either scheme of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    Tensors,
    open_checkpoint,
    read_json,
    renamed,
)
from rayva.model.import_chat import of_chat_template
from rayva.model.import_language import (
    LanguagePart,
    find_tokenizer,
    generation_settings,
    language_config,
)
from rayva.model.import_parts import (
    REMEDY,
    Choices,
    Parts,
    layer_of,
    refuse_unused,
)
from rayva.model.import_vision import (
    processor_of,
    vision_part,
    wants_padding,
)


def hugging_face_parts(source: Path, choices: Choices) -> Parts:
    """A folder of LlavaForConditionalGeneration with its processor."""
    refuse_unused(choices.language, "--language", "holds its language model itself")
    file = source / "config.json"
    raw = read_json(file)
    tensors = open_checkpoint(source)
    strategy = raw.get("vision_feature_select_strategy", "default")
    split = {part: renamed(tensors, _hf_name(part)) for part in ("language", "vision", "projector")}
    known = {tensor.key for part in split.values() for tensor in part.values()}
    for tensor in tensors.values():
        if tensor.key not in known:
            raise WeightsError(f"{tensor.where} belongs to no part of LLaVA", REMEDY)
    text = dict(raw["text_config"])
    # The language model's head is tied exactly where it is not stored.
    text["tie_word_embeddings"] = "lm_head.weight" not in split["language"] and bool(
        raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    )
    vision_raw = raw.get("vision_config")
    if not isinstance(vision_raw, dict):
        raise WeightsError(f"{file}: vision_config is {vision_raw!r}, expected an object", REMEDY)
    processor, processor_file = processor_of(choices.vision or source)
    vision = vision_part(
        {"model_type": "clip_vision_model", **vision_raw}, file, processor, processor_file, split["vision"],
        str(source),
    )  # fmt: skip
    wanted = "default" if vision.kind == "clip" else "full"
    if strategy != wanted:
        raise WeightsError(
            f"{file}: vision_feature_select_strategy is {strategy!r}, expected {wanted!r} for {vision.kind}",
            "models that see the class token cannot be imported",
        )
    return Parts(
        kind="hf",
        language=LanguagePart(language_config(text, file), file, split["language"], str(source)),
        vision=vision,
        projector=_hf_projector(split["projector"], raw, file),
        tokenizer=find_tokenizer(choices.tokenizer, source),
        generation=generation_settings(source),
        layer=layer_of(raw, "vision_feature_layer", file),
        aspect="pad" if wants_padding(processor) else "square",
        where=str(source),
        config_file=file,
        conversation=lambda tokenizer: of_chat_template(tokenizer, source),
    )


def _hf_name(part: str) -> Callable[[str], str | None]:
    """Names of one part from either scheme: the public checkpoints' or transformers 5's."""

    def name_of(name: str) -> str | None:
        name = name.removeprefix("model.")
        top, _, inner = name.partition(".")
        if part == "projector":
            return inner if top == "multi_modal_projector" else None
        if part == "vision":
            return f"vision_model.{inner.removeprefix('vision_model.')}" if top == "vision_tower" else None
        if top == "language_model":
            return inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"
        return name if top == "lm_head" else None

    return name_of


def _hf_projector(tensors: Tensors, raw: Mapping[str, Any], file: Path) -> Tensors:
    """`linear_1` and `linear_2` as Rayva's projector; an identity behind an identity is left out."""
    activation = raw.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", "linear"):
        raise WeightsError(
            f"{file}: projector_hidden_act is {activation!r}; gelu and linear can be imported",
            "LLaVA-1.5 uses gelu",
        )
    for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        if name not in tensors:
            raise WeightsError(f"{file.parent} lacks the tensor multi_modal_projector.{name}", REMEDY)
    places = {"linear_1": "0", "linear_2": "2"}
    if activation == "gelu":
        return renamed(
            tensors, lambda name: ".".join([places.get(p := name.split(".")[0], p), *name.split(".")[1:]])
        )
    weight, bias = tensors["linear_2.weight"], tensors["linear_2.bias"]
    if not _is_identity(weight.load(), bias.load()):
        raise WeightsError(
            f"{weight.where}: two linear layers without an activation (projector_hidden_act linear) are no "
            "projector of LLaVA's, unless the second is the identity",
            "import a model with one of LLaVA's projectors",
        )
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("linear_2.")}
    return renamed(rest, lambda name: name.removeprefix("linear_1."))


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    return square and bool((weight == weight.new_ones(len(weight)).diag()).all()) and not bias.any()
