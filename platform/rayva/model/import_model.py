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

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    check_part,
    has_weights,
    open_checkpoint,
    read_json,
)
from rayva.model.folder import ConversationSettings, ModelSettings, VisionSettings, save_projector
from rayva.model.import_chat import DEFAULT
from rayva.model.import_hf import hugging_face_parts
from rayva.model.import_language import (
    LanguagePart,
    check_language,
    is_original_type,
    with_marker_rows,
    write_language,
    write_tokenizer,
)
from rayva.model.import_lora import is_lora
from rayva.model.import_original import PROJECTOR_FILES, lora_parts, original_parts, stage_one_parts
from rayva.model.import_parts import (
    PROJECTOR,
    PROJECTOR_NAMES,
    Choices,
    Kind,
    Parts,
    projector_kind,
)
from rayva.model.import_vision import (
    check_vision,
    write_vision,
)
from rayva.model.projector import ProjectorKind
from rayva.model.shards import fresh_folder

_READERS = {
    "original": original_parts,
    "lora": lora_parts,
    "projector": stage_one_parts,
    "hf": hugging_face_parts,
}


@dataclass(frozen=True)
class Report:
    """What was imported: its kind, the settings written, and remarks for the person."""

    kind: Kind
    settings: ModelSettings
    notes: tuple[str, ...]


def import_model(source: Path, target: Path, choices: Choices | None = None) -> Report:
    """Writes `source` as the Rayva model folder `target`.

    Raises:
        WeightsError: names the file, and the key, that is missing, damaged, unsafe or not supported.
    """
    choices = choices or Choices()
    kind = recognise(source)
    with fresh_folder(target) as scratch:
        return _write(_READERS[kind](source, choices), scratch, choices)


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
    if has_projector and not any(PROJECTOR in name for name in open_checkpoint(source)):
        return "projector"
    if is_original_type(config):
        return "original"
    raise WeightsError(
        f"{source / 'config.json'} describes a {config.get('model_type')} model without a projector or a "
        "vision tower (no mm_* keys, no text_config)",
        "import mm_projector.bin, and give this folder as --language",
    )


def _write(parts: Parts, scratch: Path, choices: Choices) -> Report:
    for name in ("language", "vision"):
        (scratch / name).mkdir()
    language = check_language(parts.language)
    added = (*parts.added, *(parts.markers or ()))
    tokenizer, lacked = write_tokenizer(
        parts.tokenizer, scratch / "language", language.config, added, parts.kind == "hf"
    )
    language = _with_markers(parts, language, tokenizer, bool(lacked))
    language, grown = _covering(parts, language, tokenizer, choices)
    vision = check_vision(parts.vision)
    kind = projector_kind(parts.projector, parts.where)
    _check_projector(parts, kind, language.hidden, int(vision.config["hidden_size"]))
    conversation, why = _conversation(parts, tokenizer, choices)
    aspect = choices.aspect or parts.aspect
    layer = parts.layer if choices.layer is None else choices.layer
    states = int(vision.config["num_hidden_layers"]) + 1
    if not -states <= layer < states:
        raise WeightsError(
            f"{parts.config_file}: mm_vision_select_layer (vision_feature_layer) is {layer}, but the vision "
            f"tower has {states} hidden states",
            "choose one of them with --layer",
        )
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
    template = f"conversation template {conversation.template}: {why}"
    return Report(parts.kind, settings, (*parts.notes, *grown, template))


def _with_markers(
    parts: Parts, language: LanguagePart, tokenizer: PreTrainedTokenizerBase, fresh: bool
) -> LanguagePart:
    """The language model with rows for `<im_start>` and `<im_end>`, where stage 1 alone knows them."""
    if parts.kind != "projector" or parts.markers is None:
        return language
    ids = tokenizer.convert_tokens_to_ids(list(parts.markers))
    return with_marker_rows(language, ids, fresh, len(tokenizer), parts.marker_embedding)


def _covering(
    parts: Parts, language: LanguagePart, tokenizer: PreTrainedTokenizerBase, choices: Choices
) -> tuple[LanguagePart, tuple[str, ...]]:
    """The language model with a row for every token of its base's own tokenizer, and a remark if it had not.

    Training gives such a base the rows as well, but a projector or an adapter does not carry them.
    """
    rows = language.config["vocab_size"]
    more = len(tokenizer) - rows
    if parts.kind not in ("projector", "lora") or choices.tokenizer is not None or more <= 0:
        return language, ()
    note = f"{parts.tokenizer}: {more} tokens more than the embedding's {rows} rows; theirs are the mean row"
    return with_marker_rows(language, (), False, len(tokenizer), None), (note,)


def _check_projector(parts: Parts, kind: ProjectorKind, text_hidden: int, vision_hidden: int) -> None:
    shapes = {
        "weight": (text_hidden, vision_hidden), "bias": (text_hidden,),
        "0.weight": (text_hidden, vision_hidden), "0.bias": (text_hidden,),
        "2.weight": (text_hidden, text_hidden), "2.bias": (text_hidden,),
    }  # fmt: skip
    expected = {name: shapes[name] for name in PROJECTOR_NAMES[kind]}
    described = f"{parts.config_file} with a tower of {vision_hidden} features"
    check_part("projector", parts.projector, expected, parts.where, described)


def _conversation(
    parts: Parts, tokenizer: PreTrainedTokenizerBase, choices: Choices
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
