"""Takes apart the checkpoints of the original LLaVA code: whole ones, LoRA weights, projectors of stage 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.checkpoint import (
    Tensors,
    has_weights,
    open_checkpoint,
    open_weights,
    read_json,
    renamed,
)
from rayva.model.import_chat import MARKERS, of_original
from rayva.model.import_language import (
    EMBEDDING,
    HEAD,
    LanguagePart,
    check_language,
    count,
    find_tokenizer,
    generation_settings,
    is_original_type,
    language_config,
    with_marker_rows,
)
from rayva.model.import_lora import merge, other_weights, overwrite
from rayva.model.import_parts import (
    PROJECTOR,
    REMEDY,
    Choices,
    Kind,
    Parts,
    layer_of,
    projector_kind,
    refuse_unused,
)
from rayva.model.import_vision import (
    known_tower,
    tower_folder,
    tower_of_folder,
)
from rayva.vision.preprocess import Aspect

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
_PATCH = "<im_patch>"
_MOST_NEW = 4096
"""Tokens that training may have added to a base: the original adds four at most, others pad too."""
_TOWER = "model.vision_tower."
_OF_TOWER = ("mm_vision_tower", "mm_vision_select_layer", "image_aspect_ratio")


def original_parts(source: Path, choices: Choices) -> Parts:
    """A full checkpoint."""
    refuse_unused(choices.language, "--language", "holds its language model itself")
    raw = read_json(source / "config.json")
    return _from_original(source, raw, open_checkpoint(source), source / "config.json", choices, "original")


def lora_parts(source: Path, choices: Choices) -> Parts:
    """LoRA weights and what was trained beside them, on a base language model."""
    config_file = source / "config.json"
    raw = read_json(config_file)
    base = _base(source, choices, raw)
    others = other_weights(source)
    projector = {name: tensor for name, tensor in others.items() if PROJECTOR in name}
    language = {name: tensor for name, tensor in others.items() if name not in projector}
    base, notes = _with_vocabulary(base, raw, config_file, language)
    # In this order, as the original does it: an adapter may change what was trained in full.
    tensors = merge(source, overwrite(base.tensors, language)) | projector
    parts = _from_original(source, raw, tensors, config_file, choices, "lora")
    # The original adds this token, which no text uses, before those around images: it counts for their ids.
    added = (_PATCH,) if parts.markers and raw.get("mm_use_im_patch_token") else ()
    return replace(parts, added=added, notes=(*parts.notes, *notes))


def _with_vocabulary(
    base: LanguagePart, raw: Mapping[str, Any], config_file: Path, trained: Tensors
) -> tuple[LanguagePart, tuple[str, ...]]:
    """The base with the rows that `raw`, the trained model's configuration, counts, and a remark on new ones.

    Training added tokens, with the mean row for each; where the tables were trained, they are in `trained`.
    """
    rows, table = raw.get("vocab_size"), base.tensors.get(EMBEDDING)
    if table is None or not isinstance(rows, int) or rows <= table.shape[0]:
        return base, ()
    rows, before = count(raw, "vocab_size", config_file), table.shape[0]
    if rows - before > _MOST_NEW:
        return base, ()  # refused for its shape later, unless the tables were trained
    grown = with_marker_rows(check_language(base), (), False, rows, None)
    lost = [name for name in (EMBEDDING, HEAD) if name in grown.tensors and name not in trained]
    if not lost:
        return grown, ()
    names = " and ".join(lost)
    note = f"{config_file}: vocab_size is {rows}, the base's {before}; new rows of {names} are the mean row"
    return grown, (note,)


def stage_one_parts(source: Path, choices: Choices) -> Parts:
    """A projector file, or the folder that holds it, on a base language model."""
    folder, file = (source.parent, source) if source.is_file() else (source, None)
    if file is None:
        file = next(folder / name for name in PROJECTOR_FILES if (folder / name).is_file())
    own = open_weights(file)
    for name, tensor in own.items():
        if PROJECTOR not in name and not name.endswith("embed_tokens.weight"):
            raise WeightsError(f"{tensor.where} belongs to no projector", "give mm_projector.bin of stage 1")
    config_file = folder / "config.json"
    raw = read_json(config_file) if config_file.is_file() else {}
    if not is_original_type(raw):
        raw = {}
    base = _base(folder, choices, raw)
    language_raw = read_json(base.config_file)
    settings = {key: value for key, value in raw.items() if key.startswith(("mm_", "image_", "rayva_"))}
    trained = next((t for n, t in own.items() if n.endswith("embed_tokens.weight")), None)
    tensors = dict(base.tensors) | {name: tensor for name, tensor in own.items() if PROJECTOR in name}
    if not raw and is_original_type(language_raw):
        # A LLaVA as the base tells which tower it looks through, seen from its own folder.
        settings = {key: language_raw[key] for key in _OF_TOWER if key in language_raw}
        folder = base.config_file.parent
    merged = {**language_config(language_raw, base.config_file), **settings}
    if trained is not None:
        merged["mm_use_im_start_end"] = True
    parts = _from_original(folder, merged, tensors, base.config_file, choices, "projector")
    if "mm_vision_select_layer" not in settings:
        note = f"no config.json of stage 1 beside {file.name}: the tower's layer {parts.layer} is assumed"
        parts = replace(parts, notes=(*parts.notes, note))
    return parts if trained is None else replace(parts, marker_embedding=_marker_table(trained.load(), parts))


def _marker_table(embedding_VH: Tensor, parts: Parts) -> Tensor:
    """What holds the rows of `<im_start>` and `<im_end>`; `WeightsError` where it cannot."""
    if embedding_VH.ndim != 2 or embedding_VH.shape[1] != parts.language.hidden or len(embedding_VH) < 2:
        raise WeightsError(
            f"{parts.where}: {EMBEDDING} has the shape {list(embedding_VH.shape)}, "
            f"expected rows of {parts.language.hidden}",
            REMEDY,
        )
    return embedding_VH


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
    own = read_json(file)
    tensors = open_checkpoint(place)
    if is_original_type(own):
        # A LLaVA checkpoint serves as a base too: without its projector and its tower.
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_multimodal(name)}
    return LanguagePart(language_config(own, file), file, tensors, str(place))


def _is_multimodal(name: str) -> bool:
    return PROJECTOR in name or name.startswith(_TOWER)


def _from_original(
    folder: Path, raw: dict[str, Any], tensors: Tensors, config_file: Path, choices: Choices, kind: Kind
) -> Parts:
    """The parts of a checkpoint with the original's names and config keys."""
    _refuse_newer(raw, tensors, config_file)
    stored = renamed(tensors, _tower_name)
    projector = renamed(tensors, lambda name: name.rpartition(PROJECTOR)[2] if PROJECTOR in name else None)
    _check_projector_type(raw, projector, config_file)
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
    return Parts(
        kind=kind,
        language=language,
        vision=vision,
        projector=projector,
        tokenizer=find_tokenizer(choices.tokenizer, folder, choices.language),
        generation=generation_settings(folder, choices.language),
        layer=layer_of(raw, "mm_vision_select_layer", config_file),
        aspect=_aspect(raw, config_file),
        where=str(folder),
        config_file=config_file,
        conversation=lambda tokenizer: of_original(raw, tokenizer),
        markers=MARKERS if raw.get("mm_use_im_start_end") else None,
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


def _check_projector_type(raw: Mapping[str, Any], projector: Tensors, file: Path) -> None:
    """Refuses a projector that is not what config.json calls it."""
    said = raw.get("mm_projector_type")
    found = projector_kind(projector, str(file.parent))
    if said is not None and said != found:
        raise WeightsError(
            f"{file}: mm_projector_type is {said!r}, but the tensors mm_projector.* are those of {found}",
            REMEDY,
        )


def _aspect(raw: Mapping[str, Any], file: Path) -> Aspect:
    aspect = raw.get("image_aspect_ratio") or "square"
    if aspect not in ("square", "pad"):
        raise WeightsError(
            f"{file}: image_aspect_ratio is {aspect!r}; square and pad can be imported",
            "LLaVA v0 to 1.5 use one of these",
        )
    return "pad" if aspect == "pad" else "square"
