"""Imports checkpoints of other programs as Rayva model folders.

What a checkpoint is follows from its files, config keys and tensor names, never from its folder's name:

    original   config.json with `mm_*` keys, `model.mm_projector.*` among the language model's tensors
    lora       adapter_config.json, adapter_model.*, non_lora_trainables.bin, on a base language model
    projector  mm_projector.bin of stage 1, on a base language model
    hf         Hugging Face's LLaVA: config.json with `text_config` and `vision_config`

Tensors are copied in the precision in which they are stored, a few at a time. The folder is written
beside its target and renamed when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    Tensors,
    check_part,
    has_weights,
    open_checkpoint,
    open_weights,
    read_json,
    renamed,
)
from rayva.model.folder import ConversationSettings, ModelSettings, VisionSettings, save_projector
from rayva.model.import_chat import BUILT_IN, DEFAULT, MARKERS, of_chat_template, of_original
from rayva.model.import_language import (
    LanguagePart,
    append_rows,
    check_language,
    find_tokenizer,
    generation_settings,
    is_original_type,
    language_config,
    write_language,
    write_tokenizer,
)
from rayva.model.import_lora import is_lora, merge, other_weights, overwrite
from rayva.model.import_vision import (
    VisionPart,
    check_vision,
    known_tower,
    processor_of,
    tower_folder,
    tower_of_folder,
    vision_part,
    wants_padding,
    write_vision,
)
from rayva.model.projector import ProjectorKind
from rayva.model.shards import fresh_folder
from rayva.vision.preprocess import Aspect

Kind = Literal["original", "lora", "projector", "hf"]
PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
_PROJECTOR = "mm_projector."
_TOWER = "model.vision_tower."
_EMBEDDING = "model.embed_tokens.weight"
_NAMES: dict[ProjectorKind, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "mlp2x_gelu": ("0.weight", "0.bias", "2.weight", "2.bias"),
}
_REMEDY = "fetch or save the checkpoint again"


@dataclass(frozen=True)
class Choices:
    """What a person said beside the checkpoint; None leaves it to the checkpoint."""

    language: Path | None = None
    vision: Path | None = None
    tokenizer: Path | None = None
    template: str | None = None
    system: str | None = None
    aspect: Aspect | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Report:
    """What was imported: its kind, the settings written, and remarks for the person."""

    kind: Kind
    settings: ModelSettings
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Parts:
    """A checkpoint taken apart, nothing of it read yet.

    `projector` is by the names in projector.safetensors. `conversation` is asked once the tokenizer is
    known. `markers` are tokens around each image, `marker_embedding` their trained rows.
    """

    kind: Kind
    language: LanguagePart
    vision: VisionPart
    projector: Tensors
    tokenizer: Path
    generation: dict[str, Any]
    layer: int
    aspect: Aspect
    where: str
    config_file: Path
    conversation: Callable[[PreTrainedTokenizerBase], tuple[ConversationSettings | None, str]]
    markers: tuple[str, str] | None = None
    marker_embedding: Tensor | None = None
    notes: tuple[str, ...] = field(default=())


def import_model(source: Path, target: Path, choices: Choices | None = None) -> Report:
    """Writes `source` as the Rayva model folder `target`.

    Raises:
        WeightsError: names the file, and the key, that is missing, damaged, unsafe or not supported.
    """
    choices = choices or Choices()
    kind = recognise(source)
    with fresh_folder(target) as scratch:
        read = {"original": _original, "lora": _lora, "projector": _stage_one, "hf": _hugging_face}[kind]
        return _write(read(source, choices), scratch, choices)


def recognise(source: Path) -> Kind:
    """What `source` is, judged by its content.

    Raises:
        WeightsError: nothing that can be imported.
    """
    if source.is_file():
        return "projector"
    if not source.is_dir():
        raise WeightsError(f"there is no checkpoint {source}", "give a folder, or mm_projector.bin")
    if (source / "rayva.json").is_file():
        raise WeightsError(f"{source} is a Rayva model folder already", "use it as it is")
    if is_lora(source):
        return "lora"
    has_projector = any((source / name).is_file() for name in PROJECTOR_FILES)
    if has_projector and not has_weights(source):
        return "projector"
    config = read_json(source / "config.json")
    if config.get("model_type") == "llava" and isinstance(config.get("text_config"), dict):
        return "hf"
    if "text_config" in config or "vision_config" in config:
        raise WeightsError(
            f"{source / 'config.json'}: model_type {config.get('model_type')!r} with text_config "
            f"{type(config.get('text_config')).__name__} is no LLaVA of Hugging Face's",
            "import a folder of LlavaForConditionalGeneration (model_type llava)",
        )
    if has_projector and not any(_PROJECTOR in name for name in open_checkpoint(source)):
        return "projector"
    if is_original_type(config):
        return "original"
    raise WeightsError(
        f"{source / 'config.json'} describes a {config.get('model_type')} model without a projector or a "
        "vision tower (no mm_* keys, no text_config)",
        "import mm_projector.bin, and give this folder as --language",
    )


# --- the original layouts ---


def _original(source: Path, choices: Choices) -> _Parts:
    _refuse_unused(choices.language, "--language", "holds its language model itself")
    raw = read_json(source / "config.json")
    return _from_original(source, raw, open_checkpoint(source), source / "config.json", choices, "original")


def _lora(source: Path, choices: Choices) -> _Parts:
    base = _base(source, choices, read_json(source / "config.json"))
    others = other_weights(source)
    merged = merge(source, base.tensors)
    projector = {name: tensor for name, tensor in others.items() if _PROJECTOR in name}
    language = {name: tensor for name, tensor in others.items() if name not in projector}
    tensors = overwrite(merged, language) | projector
    return _from_original(
        source, read_json(source / "config.json"), tensors, source / "config.json", choices, "lora"
    )


def _stage_one(source: Path, choices: Choices) -> _Parts:
    folder, file = (source.parent, source) if source.is_file() else (source, None)
    if file is None:
        file = next(folder / name for name in PROJECTOR_FILES if (folder / name).is_file())
    own = open_weights(file)
    for name, tensor in own.items():
        if _PROJECTOR not in name and not name.endswith("embed_tokens.weight"):
            raise WeightsError(f"{tensor.where} belongs to no projector", "give mm_projector.bin of stage 1")
    config_file = folder / "config.json"
    raw = read_json(config_file) if config_file.is_file() else {}
    if not is_original_type(raw):
        raw = {}
    base = _base(folder, choices, raw)
    language_raw = read_json(base.config_file)
    settings = {key: value for key, value in raw.items() if key.startswith(("mm_", "image_", "rayva_"))}
    trained = next((t for n, t in own.items() if n.endswith("embed_tokens.weight")), None)
    tensors = dict(base.tensors) | {name: tensor for name, tensor in own.items() if _PROJECTOR in name}
    merged = {**language_config(language_raw, base.config_file), **settings}
    if trained is not None:
        merged["mm_use_im_start_end"] = True
    parts = _from_original(folder, merged, tensors, base.config_file, choices, "projector")
    if not raw:
        note = f"no config.json of stage 1 beside {file.name}: the tower's layer {parts.layer} is assumed"
        parts = replace(parts, notes=(*parts.notes, note))
    return parts if trained is None else replace(parts, marker_embedding=_marker_rows(trained.load(), parts))


def _marker_rows(embedding_VH: Tensor, parts: _Parts) -> Tensor:
    """The rows of `<im_start>` and `<im_end>`: the last two, as the original adds them."""
    if embedding_VH.ndim != 2 or embedding_VH.shape[1] != parts.language.hidden or len(embedding_VH) < 2:
        raise WeightsError(
            f"{parts.where}: {_EMBEDDING} has the shape {list(embedding_VH.shape)}, "
            f"expected rows of {parts.language.hidden}",
            _REMEDY,
        )
    return embedding_VH[-2:]


def _base(folder: Path, choices: Choices, raw: Mapping[str, Any]) -> LanguagePart:
    """The base language model: --language, or the folder itself where it holds one."""
    place = choices.language or (folder if has_weights(folder) else None)
    if place is None:
        named = raw.get("_name_or_path")
        hint = f" (trained from {named})" if isinstance(named, str) and named else ""
        raise WeightsError(
            f"{folder} holds no language model of its own{hint}", "give its base model's folder: --language"
        )
    if not place.is_dir():
        raise WeightsError(f"there is no language model folder {place}", "give --language a folder")
    file = place / "config.json"
    config = language_config(read_json(file), file)
    # A LLaVA checkpoint serves as a base too: without its projector and its tower.
    tensors = {n: t for n, t in open_checkpoint(place).items() if not _is_multimodal(n)}
    return LanguagePart(config, file, tensors, str(place))


def _is_multimodal(name: str) -> bool:
    return _PROJECTOR in name or name.startswith(_TOWER)


def _from_original(
    folder: Path, raw: dict[str, Any], tensors: Tensors, config_file: Path, choices: Choices, kind: Kind
) -> _Parts:
    """The parts of a checkpoint with the original's names and config keys."""
    _refuse_newer(raw, tensors, config_file)
    stored = renamed(tensors, _tower_name)
    projector = renamed(tensors, lambda name: name.rpartition(_PROJECTOR)[2] if _PROJECTOR in name else None)
    own = {name: tensor for name, tensor in tensors.items() if not _is_multimodal(name)}
    named = raw.get("mm_vision_tower", raw.get("vision_tower"))
    place = tower_folder(folder, named, choices.vision, bool(stored))
    vision = (
        known_tower(str(named), stored, config_file)
        if place is None
        else tower_of_folder(place, stored or None)
    )
    if stored:
        vision = replace(vision, where=str(folder))
    language = LanguagePart(language_config(raw, config_file), config_file, own, str(folder))
    return _Parts(
        kind=kind,
        language=language,
        vision=vision,
        projector=projector,
        tokenizer=find_tokenizer(choices.tokenizer, folder, choices.language),
        generation=generation_settings(folder, choices.language),
        layer=_layer(raw, "mm_vision_select_layer", config_file),
        aspect=_aspect(raw, config_file),
        where=str(folder),
        config_file=config_file,
        conversation=lambda tokenizer: of_original(raw, tokenizer),
        markers=MARKERS if raw.get("mm_use_im_start_end") else None,
        notes=_projector_remarks(raw, projector, config_file),
    )


def _tower_name(name: str) -> str | None:
    """`model.vision_tower.vision_tower.vision_model.*` as `vision_model.*`; None for other tensors."""
    if not name.startswith(_TOWER):
        return None
    inner = name.removeprefix(_TOWER).removeprefix("vision_tower.")
    return inner if inner.startswith("vision_model.") else f"vision_model.{inner}"


def _refuse_newer(raw: Mapping[str, Any], tensors: Tensors, file: Path) -> None:
    """LLaVA-NeXT and others have the same names, but splice other tokens."""
    if raw.get("mm_patch_merge_type", "flat") != "flat" or "model.image_newline" in tensors:
        raise WeightsError(
            f"{file}: mm_patch_merge_type {raw.get('mm_patch_merge_type')!r} is LLaVA-NeXT's",
            "LLaVA v0 to 1.5 can be imported",
        )
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise WeightsError(
            f"{file}: mm_vision_select_feature is {feature!r}; models that see the class token cannot be "
            "imported",
            "LLaVA v0 to 1.5 use patch",
        )


def _projector_remarks(raw: Mapping[str, Any], projector: Tensors, file: Path) -> tuple[str, ...]:
    """Refuses a projector that is not what config.json calls it."""
    said = raw.get("mm_projector_type")
    found = projector_kind(projector, str(file.parent))
    if said is not None and said != found:
        raise WeightsError(
            f"{file}: mm_projector_type is {said!r}, but the tensors mm_projector.* are those of {found}",
            _REMEDY,
        )
    return ()


def projector_kind(projector: Tensors, where: str) -> ProjectorKind:
    """The kind whose tensors these are.

    Raises:
        WeightsError: none, or some are missing.
    """
    if not projector:
        raise WeightsError(f"{where} lacks the projector (model.mm_projector.*)", _REMEDY)
    kind: ProjectorKind = "linear" if {"weight", "bias"} & set(projector) else "mlp2x_gelu"
    for name in _NAMES[kind]:
        if name not in projector:
            raise WeightsError(f"{where} lacks the projector's tensor {_PROJECTOR}{name}", _REMEDY)
    for name, tensor in projector.items():
        if name not in _NAMES[kind]:
            raise WeightsError(f"{tensor.where} is no part of a {kind} projector", _REMEDY)
    return kind


def _layer(raw: Mapping[str, Any], key: str, file: Path) -> int:
    layer = raw.get(key, -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise WeightsError(f"{file}: {key} is {layer!r}, expected one layer's number", _REMEDY)
    return layer


def _aspect(raw: Mapping[str, Any], file: Path) -> Aspect:
    aspect = raw.get("image_aspect_ratio") or "square"
    if aspect not in ("square", "pad"):
        raise WeightsError(
            f"{file}: image_aspect_ratio is {aspect!r}; square and pad can be imported",
            "LLaVA v0 to 1.5 use one of these",
        )
    return "pad" if aspect == "pad" else "square"


def _refuse_unused(given: Path | None, option: str, why: str) -> None:
    if given is not None:
        raise WeightsError(f"{option} {given} is of no use: the checkpoint {why}", f"leave {option} out")


# --- Hugging Face's LLaVA ---


def _hugging_face(source: Path, choices: Choices) -> _Parts:
    _refuse_unused(choices.language, "--language", "holds its language model itself")
    file = source / "config.json"
    raw = read_json(file)
    tensors = open_checkpoint(source)
    strategy = raw.get("vision_feature_select_strategy", "default")
    split = {part: renamed(tensors, _hf_name(part)) for part in ("language", "vision", "projector")}
    known = {tensor.key for part in split.values() for tensor in part.values()}
    for tensor in tensors.values():
        if tensor.key not in known:
            raise WeightsError(f"{tensor.where} belongs to no part of LLaVA", _REMEDY)
    text = dict(raw["text_config"])
    # The language model's head is tied exactly where it is not stored.
    text["tie_word_embeddings"] = "lm_head.weight" not in split["language"] and bool(
        raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    )
    vision_raw = raw.get("vision_config")
    if not isinstance(vision_raw, dict):
        raise WeightsError(f"{file}: vision_config is {vision_raw!r}, expected an object", _REMEDY)
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
    return _Parts(
        kind="hf",
        language=LanguagePart(language_config(text, file), file, split["language"], str(source)),
        vision=vision,
        projector=_hf_projector(split["projector"], raw, file),
        tokenizer=find_tokenizer(choices.tokenizer, source),
        generation=generation_settings(source),
        layer=_layer(raw, "vision_feature_layer", file),
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
            raise WeightsError(f"{file.parent} lacks the tensor multi_modal_projector.{name}", _REMEDY)
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


# --- writing ---


def _write(parts: _Parts, scratch: Path, choices: Choices) -> Report:
    for name in ("language", "vision"):
        (scratch / name).mkdir()
    tokenizer = write_tokenizer(parts.tokenizer, scratch / "language", parts.markers or ())
    language = _with_markers(parts, tokenizer)
    language = check_language(language)
    vision = check_vision(parts.vision)
    kind = projector_kind(parts.projector, parts.where)
    _check_projector(parts, kind, language.hidden, int(vision.config["hidden_size"]))
    conversation, why = _conversation(parts, tokenizer, choices)
    aspect = choices.aspect or parts.aspect
    layer = parts.layer if choices.layer is None else choices.layer
    tower = write_vision(vision, scratch / "vision", layer, aspect)
    write_language(language, scratch / "language", tokenizer, parts.generation)
    save_projector({n: t.load() for n, t in parts.projector.items()}, scratch / "projector.safetensors")
    settings = ModelSettings(
        vision=VisionSettings(
            kind=vision.kind,
            layer=layer,
            image_size=None,
            aspect=aspect,
            tokens=tower.num_tokens,
            hidden=tower.hidden_size,
            digest=tower.digest,
        ),
        conversation=conversation,
        projector=kind,
    )
    settings.write(scratch)
    return Report(
        parts.kind, settings, (*parts.notes, f"conversation template {conversation.template}: {why}")
    )


def _with_markers(parts: _Parts, tokenizer: PreTrainedTokenizerBase) -> LanguagePart:
    """The language model with rows for `<im_start>` and `<im_end>`, where stage 1 alone knows them."""
    if parts.markers is None:
        return parts.language
    missing = len(tokenizer) - int(parts.language.config.get("vocab_size", 0))
    if parts.kind == "projector" and missing > 0:
        return append_rows(parts.language, missing, parts.marker_embedding)
    return parts.language


def _check_projector(parts: _Parts, kind: ProjectorKind, text_hidden: int, vision_hidden: int) -> None:
    shapes = {
        "weight": (text_hidden, vision_hidden), "bias": (text_hidden,),
        "0.weight": (text_hidden, vision_hidden), "0.bias": (text_hidden,),
        "2.weight": (text_hidden, text_hidden), "2.bias": (text_hidden,),
    }  # fmt: skip
    expected = {name: shapes[name] for name in _NAMES[kind]}
    described = f"{parts.config_file} with a tower of {vision_hidden} features"
    check_part("projector", parts.projector, expected, parts.where, described)


def _conversation(
    parts: _Parts, tokenizer: PreTrainedTokenizerBase, choices: Choices
) -> tuple[ConversationSettings, str]:
    found, why = parts.conversation(tokenizer)
    if found is None:
        why = f"{why}; {DEFAULT} is assumed, choose another with --template"
        found = ConversationSettings(DEFAULT, None)
    elif parts.kind != "hf" and choices.template is None:
        why = f"{why}; choose another with --template"
    if choices.template is not None:
        found, why = ConversationSettings(choices.template, None, found.image_markers), "as chosen"
    if choices.system is not None:
        found = replace(found, system=choices.system)
    if parts.markers is not None:
        found = replace(found, image_markers=parts.markers)
    found.build(tokenizer)  # a template that does not suit the tokenizer is told now
    return found, why


TEMPLATES = (*BUILT_IN, "tokenizer")
