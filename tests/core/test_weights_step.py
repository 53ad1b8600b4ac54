"""The weights step: what cannot be used is refused by name, before any work."""

import json
from pathlib import Path

import pytest

from rayva.errors import WeightsError
from rayva.orchestration import weights
from rayva.orchestration.pipeline import StepContext
from rayva.recipes.load import resolve
from rayva.steps import StepFolder
from rayva.storage import Storage


def context(tmp_path: Path, *overrides: str) -> StepContext:
    recipe = resolve("tiny", overrides=overrides)
    storage = Storage(str(tmp_path / "run"))
    return StepContext(recipe, storage, StepFolder(storage, "weights", "0" * 64), {}, None)  # type: ignore[arg-type]


def folder(tmp_path: Path, name: str, **config: object) -> Path:
    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def local(tmp_path: Path) -> tuple[str, str]:
    vision = folder(tmp_path, "vision")
    language = folder(tmp_path, "language", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    return f"vision.path={vision}", f"language.path={language}"


def test_local_folders_are_digested_by_content(tmp_path: Path) -> None:
    settings = local(tmp_path)
    first = weights.run(context(tmp_path, *settings)).outputs
    assert first["vision"]["path"] == str(tmp_path / "vision")
    marks = weights.fingerprint(context(tmp_path, *settings).recipe)
    (tmp_path / "language" / "model.safetensors").write_bytes(b"WEIGHTS")
    second = weights.run(context(tmp_path, *settings)).outputs
    assert second["vision"] == first["vision"]
    assert second["language"]["digest"] != first["language"]["digest"]
    changed = weights.fingerprint(context(tmp_path, *settings).recipe)
    assert changed["language.path"] != marks["language.path"]


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    wrong = context(tmp_path, *local(tmp_path), "language.layers=32")
    with pytest.raises(WeightsError, match=r"language\.layers=32.*num_hidden_layers=2"):
        weights.run(wrong)


def test_unknown_builtin_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"vision\.path = builtin:huge names no built-in"):
        weights.run(context(tmp_path, "vision.path=builtin:huge"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    vision, _ = local(tmp_path)
    with pytest.raises(WeightsError, match=r"language\.path = /no/such/folder is not a folder"):
        weights.run(context(tmp_path, vision, "language.path=/no/such/folder"))


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    settings = local(tmp_path)
    (tmp_path / "language" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is damaged"):
        weights.run(context(tmp_path, *settings))
