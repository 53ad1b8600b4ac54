"""The weights step: finds the vision tower and the language model, checks and digests them.

`builtin:tiny` stands for models that the step trains itself; every other path is a local folder or a
name on the Hugging Face hub, which is pinned to the commit found.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayva.errors import WeightsError
from rayva.recipes.schema import Language, Recipe

if TYPE_CHECKING:
    from rayva.orchestration.pipeline import StepContext, StepResult

BUILTIN = "builtin:"
_TINY = "builtin:tiny"
_CHUNK = 1 << 22
_SHAPE = {"hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
"""Settings of `language` and the config.json keys that they must equal."""


def run(ctx: StepContext) -> StepResult:
    """Writes `vision/` and `language/` for built-in weights; records path, commit and digest of all.

    Raises:
        WeightsError: weights that are missing, unknown, or of another shape than the recipe says.
    """
    from rayva.orchestration.pipeline import StepResult

    recipe = ctx.recipe
    tiny = [part for part in ("vision", "language") if getattr(recipe, part).path.startswith(BUILTIN)]
    for part in tiny:
        _require_known(part, getattr(recipe, part).path)
    metrics = _train_tiny(ctx) if tiny else {}
    outputs = {
        "vision": {"kind": recipe.vision.kind, **_locate(ctx, "vision")},
        "language": _locate(ctx, "language"),
    }
    _check_shape(recipe.language, outputs["language"]["folder"])
    for found in outputs.values():
        del found["folder"]
    return StepResult(outputs, metrics)


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """Names, sizes and times of local weight files, so that exchanged weights rerun what used them."""
    found: dict[str, str] = {}
    for part in ("vision", "language"):
        folder = Path(getattr(recipe, part).path).expanduser()
        if folder.is_dir():
            files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(folder)]
            found[f"{part}.path"] = hashlib.sha256(repr(files).encode()).hexdigest()
    return found


def _require_known(part: str, path: str) -> None:
    if path != _TINY:
        raise WeightsError(
            f"{part}.path = {path} names no built-in weights.",
            f"use {_TINY}, a local folder, or a name on the Hugging Face hub",
        )


def _train_tiny(ctx: StepContext) -> dict[str, float]:
    """Trains the built-in models into this step's folder; what an earlier attempt finished is kept."""
    from rayva.training import base_weights

    weights, storage = ctx.recipe.weights, ctx.storage
    tokenizer = base_weights.train_tokenizer(weights.seed)
    metrics: dict[str, float] = {}
    for part, make, save in (
        ("vision", base_weights.clip_trainee, base_weights.save_clip),
        ("language", base_weights.language_trainee, base_weights.save_language_model),
    ):
        done, checkpoint = ctx.folder.join(f"{part}.json"), ctx.folder.join(f"{part}-training.pt")
        if not storage.exists(done):
            trainee = make(tokenizer, weights, weights.seed)
            loss = base_weights.fit(trainee, storage, checkpoint)
            save(trainee.model, tokenizer, storage, ctx.folder.join(part))
            storage.write_json(done, {"loss": loss})
        storage.delete(checkpoint)
        metrics[f"{part}_loss"] = float(storage.read_json(done)["loss"])
    return metrics


def _locate(ctx: StepContext, part: str) -> dict[str, Any]:
    settings = getattr(ctx.recipe, part)
    if settings.path.startswith(BUILTIN):
        folder = ctx.storage.localize(ctx.folder.join(part))
        return {"path": part, "revision": None, "digest": _digest(folder), "folder": folder}
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return {"path": str(folder), "revision": None, "digest": _digest(folder), "folder": folder}
    if folder.is_absolute() or settings.path.startswith(".") or settings.path.count("/") != 1:
        raise WeightsError(
            f"{part}.path = {settings.path} is not a folder.",
            f"set {part}.path to a folder in Hugging Face format, or to a hub name (owner/name)",
        )
    folder = _hub_config(part, settings.path, settings.revision)
    # A snapshot's folder is called after its commit.
    commit = folder.name
    digest = f"{settings.path}@{commit}"
    return {"path": settings.path, "revision": commit, "digest": digest, "folder": folder}


def _hub_config(part: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightsError(
            f"{part}.path = {name} is neither a local folder nor reachable on the Hugging Face hub: "
            f"{str(error).splitlines()[0]}",
            f"check the name and the network, or download it elsewhere and set {part}.path to the folder",
        ) from error


def _check_shape(language: Language, folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"language.path has no config.json ({path})."
        raise WeightsError(what, "give a causal language model's folder in Hugging Face format") from error
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}.", "fetch the weights again") from error
    for setting, key in _SHAPE.items():
        expected = getattr(language, setting)
        if expected is not None and config.get(key) != expected:
            raise WeightsError(
                f"The recipe says language.{setting}={expected}, but {path} has {key}={config.get(key)}.",
                f"choose the weights that the recipe is for, or set language.{setting}={config.get(key)}",
            )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _digest(folder: Path) -> str:
    """sha256 over the names and contents of the folder's files."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
