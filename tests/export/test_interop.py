"""The original LLaVA layout, the projector alone, and the Rayva form."""

from __future__ import annotations

import argparse
import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayva.commands import export
from rayva.errors import ServingError, WeightsError
from rayva.model.checkpoint import open_checkpoint
from rayva.model.export_hf import export_rayva
from rayva.model.export_llava import export_llava, export_projector
from rayva.model.folder import load_assistant
from rayva.model.shards import CheckpointWriter, fresh_folder
from tests.export.tiny_model import HIDDEN, make_model_folder


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("interop"), projector=request.param)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in open_checkpoint(folder).items()}


def test_the_original_layout_holds_every_weight_unchanged(source: Path, tmp_path: Path) -> None:
    export_llava(source, tmp_path / "llava")
    tensors = all_tensors(tmp_path / "llava")
    language = load_file(source / "language" / "model.safetensors")
    projector = load_file(source / "projector.safetensors")
    expected = language | {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_hidden_size"] == HIDDEN
    assert config["mm_projector_type"] == json.loads((source / "rayva.json").read_text())["projector"]
    assert config["mm_vision_select_layer"] == -2
    assert (tmp_path / "llava" / "tokenizer.json").exists()
    assert (tmp_path / "llava" / config["mm_vision_tower"] / "config.json").exists()


def test_the_projector_alone(source: Path, tmp_path: Path) -> None:
    export_projector(source, tmp_path / "projector")
    loaded = torch.load(tmp_path / "projector" / "mm_projector.bin", weights_only=True)
    own = load_file(source / "projector.safetensors")
    assert set(loaded) == {f"model.mm_projector.{name}" for name in own}
    assert all(torch.equal(loaded[f"model.mm_projector.{name}"], own[name]) for name in own)
    again = load_file(tmp_path / "projector" / "mm_projector.safetensors")
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def test_the_rayva_form_is_complete(source: Path, tmp_path: Path) -> None:
    export_rayva(source, tmp_path / "rayva")
    assert load_assistant(tmp_path / "rayva").tower.digest == load_assistant(source).tower.digest


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(arguments))


@pytest.mark.parametrize("form", ["hf", "llava", "projector"])
def test_the_command_writes_each_form_from_a_folder(
    source: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert run_command(str(source), str(target), "--format", form) == 0
    assert str(target) in capsys.readouterr().out
    assert list(target.glob("*.json"))
    with pytest.raises(WeightsError, match="exists already"):
        run_command(str(source), str(target), "--format", form)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"rayva\.json"):
        run_command(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def export_half() -> None:
        with fresh_folder(tmp_path / "out") as scratch:
            (scratch / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_half()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_projector_is_named(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    (copy / "projector.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="projector"):
        export_projector(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_by_its_number(tmp_path: Path) -> None:
    """A limit on the size of files fails a write like a full disk does, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            CheckpointWriter(tmp_path, 1).add({"x": torch.zeros(10_000), "y": torch.zeros(1)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
