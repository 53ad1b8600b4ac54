"""Both stages by the documented command under torchrun, the second with LoRA: its outputs serve."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rayva.errors import TrainingError
from rayva.model.folder import load_assistant
from rayva.model.language import load_language_model
from rayva.orchestration.local_training import _device, main
from rayva.orchestration.pipeline import described, make_plan
from rayva.recipes import from_dict, to_dict
from rayva.recipes.schema import Recipe
from rayva.storage import Storage
from tests.training.stage_support import finished_inputs, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 48


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose steps before training are finished in `tmp_path`/run."""
    storage, elsewhere = Storage(str(tmp_path / "run")), Storage(str(tmp_path / "made"))
    made = finished_inputs(elsewhere, SAMPLES)
    weights = Path(elsewhere.path(made["weights"].rel))
    shutil.copytree(elsewhere.path("features"), storage.path("features"))
    changes = {
        "name": "tiny",
        "vision": {"path": str(weights / "vision")},
        "language": {"path": str(weights / "language")},
        "data": {"source": "scenes", "train_scenes": 10, "test_scenes": 10},
    }
    settings = to_dict(tiny_recipe())
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    recipe = from_dict(settings)
    for planned in make_plan(recipe, storage):
        if planned.step.name in made:
            old = made[planned.step.name]
            shutil.copytree(elsewhere.path(old.rel), storage.path(planned.folder.rel))
            planned.folder.finish(old.outputs, {}, 0, described(recipe, planned))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    return recipe


def _start(folder: Path, stage: str, workers: int, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "pipelines/train_local.py", "--config", str(folder / "recipe.json"),
        "--storage", str(folder / "run"), "--stage", stage, "--metrics", str(folder / f"{stage}.jsonl"),
        *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stderr=subprocess.PIPE
    )


def _finish(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-4000:]
    return told


def _steps(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_missing_step_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "tiny", "--storage", str(tmp_path), "--stage", "finetune"]) == 2
    assert "The step weights, which finetune needs, is not finished" in capsys.readouterr().err


def test_the_advised_command_has_all_settings_of_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my settings.yaml"
    config.write_text("name: mine\n")
    given = ["--recipe", "tiny", "--config", str(config), "--storage", f"{tmp_path}/a run"]
    overrides = ["conversation.system=Be brief. It's late.", "finetune.lr=3e-4"]
    assert main([*given, "--stage", "pretrain", *overrides]) == 2
    advice = capsys.readouterr().err.strip().splitlines()[-1].partition("finish it with: ")[2]
    assert shlex.split(advice) == [
        "python", "pipelines/full.py", *given, "--until", "weights", *overrides
    ]  # fmt: skip


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert _device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TrainingError, match="--nproc-per-node 1"):
        _device("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(TrainingError, match="give --device cpu"):
        _device("cuda")


@pytest.mark.slow
def test_both_stages_under_torchrun(recipe: Recipe, tmp_path: Path) -> None:
    lora = ("finetune.lora.r=4", "finetune.zero=2", "finetune.checkpoint_every=2")
    _finish(_start(tmp_path, "pretrain", 2))
    stage2 = _start(tmp_path, "finetune", 2, *lora)
    # A kill in the middle; the same command goes on, here with one process.
    saved = tmp_path / "run" / "steps"
    while not list(saved.glob("finetune-*/attempts/saved/checkpoint_*_00000002/manifest-00001.json")):
        assert stage2.poll() is None
        time.sleep(0.02)
    stage2.send_signal(signal.SIGTERM)
    stage2.communicate(timeout=300)
    told = _finish(_start(tmp_path, "finetune", 1, *lora))
    assert "finetune is finished" in told
    steps = [row["step"] for row in _steps(tmp_path / "finetune.jsonl")]
    assert sorted(set(steps)) == list(range(1, 7))
    assert steps[-1] == 6

    (folder,) = saved.glob("finetune-*")
    assert json.loads((folder / "manifest.json").read_text())["outputs"]["steps"] == 6
    assert not (folder / "attempts").exists()
    merged = load_assistant(folder / "model").model.language
    base = load_language_model(recipe.language.path, torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert "finetune is finished" in _finish(_start(tmp_path, "finetune", 1, *lora))


_LEAVES = """
import os, torch, torch.distributed as dist
from rayva.training.engine import init_distributed, leave_distributed

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

init_distributed(torch.device("cpu"))
dist.all_reduce(torch.ones(1))
assert any("gloo" in name for name in threads())
leave_distributed()
assert not any("gloo" in name for name in threads()), threads()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_the_process_group_outlives_leaving_it() -> None:
    """One that lets go of a tensor while Python ends would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAVES], env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
