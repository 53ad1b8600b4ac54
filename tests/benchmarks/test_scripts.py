"""Every benchmark runs alone at its smallest size, and its figures are possible ones. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    "evaluate",
    "features",
    "generate",
    "gpu_loss",
    "gpu_step",
    "loss_memory",
    "plan",
    "resume",
    "scaling",
    "steps",
    "throughput",
    "vision_modes",
    "wait",
]
TINY = ["--language", "tiny", "--tower", "tiny", "--text-scale", "0.2", "--precision", "float32"]
TINY += ["--batch-size", "4", "--micro-batch-size", "2", "--steps", "2"]


def _run(script: str, folder: Path, *options: str) -> tuple[Any, str]:
    """The figures that a script writes, and the section that it prints."""
    target = folder / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *options, "--json", str(target)]
    # Alone: nothing but what the script itself puts on the path, and no rank of a group that tests have made.
    unset = {"PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    env = {key: value for key, value in os.environ.items() if key not in unset} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = json.loads(target.read_text())
    # Libraries may have printed a word of their own before.
    assert "\n## " in f"\n{done.stdout}"
    assert f"commit {whole['commit']}" in done.stdout
    assert f"benchmarks/{script}.py" in whole["command"]
    return whole["figures"], done.stdout


def test_make_bench_runs_every_script() -> None:
    files = (ROOT / "benchmarks").glob("*.py")
    found = sorted(file.stem for file in files if "\ndef main()" in file.read_text())
    # vLLM has an environment of its own: docs/interop.md.
    assert [script for script in found if script != "vllm_agreement"] == sorted(SCRIPTS)
    makefile = (ROOT / "Makefile").read_text()
    assert [script for script in SCRIPTS if f"benchmarks/{script}.py" not in makefile] == []


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], pytest.param(["--compile"], marks=pytest.mark.thorough)])
def test_throughput_compares_the_same_training(tmp_path: Path, more: list[str]) -> None:
    figures, text = _run("throughput", tmp_path, *TINY, "--stages", "finetune", *more)
    stage = figures["stages"]["finetune"]
    assert stage["loss_difference"] < 1e-3
    assert len(stage["sides"]["rayva"]["losses"]) == len(stage["sides"]["random"]["losses"]) == 3
    assert len(set(stage["sides"]["rayva"]["losses"])) == 3
    assert list(stage["sides"]) == ["random", "grouped", "rayva", *(["compiled"] if more else [])]
    for side in stage["sides"].values():
        assert side["samples_per_second"] > 0
        assert side["cpu_seconds"] > 0
        assert 0 <= side["padding"] < 1
    rayva = stage["sides"]["rayva"]
    assert rayva["with_encoding"] < rayva["samples_per_second"]
    assert stage["sides"]["grouped"]["padding"] < stage["sides"]["random"]["padding"]
    assert "One epoch that has to encode first" in text
    assert ("| the same, compiled |" in text) == bool(more)


@pytest.mark.slow
def test_the_loss_takes_less_memory_than_full_logits(tmp_path: Path) -> None:
    shape = ["--tokens", "4096", "--vocabulary", "16384", "--hidden", "64", "--dtype", "float32"]
    figures, _ = _run("loss_memory", tmp_path, *shape)
    logits = 4096 * 16384 * 4
    assert figures["full"]["peak_bytes"] >= 2 * logits  # logits and their gradient
    assert figures["all"]["peak_bytes"] <= figures["full"]["peak_bytes"] / 2
    assert figures["all"]["loss"] == pytest.approx(figures["full"]["loss"], rel=1e-5)


def test_the_plan_needs_no_memory_that_grows(tmp_path: Path) -> None:
    figures, _ = _run("plan", tmp_path, "--samples", "1e6", "1e10", "--batch-size", "64")
    assert [(one["samples"], one["datasets"]) for one in figures] == [
        (10**6, 1), (10**6, 3), (10**10, 1), (10**10, 3),
    ]  # fmt: skip
    for small, large in (figures[0::2], figures[1::2]):
        assert large["peak_bytes"] < 200e6
        assert abs(large["peak_bytes"] - small["peak_bytes"]) < 20e6


@pytest.mark.slow
@pytest.mark.thorough
def test_training_goes_on_after_the_kill(tmp_path: Path) -> None:
    figures, _ = _run("resume", tmp_path, *TINY, "--stages", "finetune")
    runs = figures["finetune"]
    assert runs["fresh"]["steps"] == [1, 2, 3, 4]
    assert runs["resumed"]["steps"] == [3, 4]
    assert runs["bit_identical"]
    assert all(0 < run["train_called"] < run["moments"][0] for run in (runs["fresh"], runs["resumed"]))


@pytest.mark.slow
@pytest.mark.thorough
def test_stored_and_inline_features_train_alike(tmp_path: Path) -> None:
    figures, _ = _run("vision_modes", tmp_path, *TINY, "--stages", "pretrain")
    sides = figures["stages"]["pretrain"]
    assert sides["stored"]["losses"] == pytest.approx(sides["inline"]["losses"], rel=1e-3)
    assert figures["encoding"]["bytes_per_image"] == 16 * 32 * 2
    assert figures["encoding"]["images_per_second"] > 0


@pytest.mark.slow
@pytest.mark.thorough
def test_two_workers_do_the_work_of_one(tmp_path: Path) -> None:
    figures, _ = _run("scaling", tmp_path, *TINY, "--stages", "finetune")
    one, two = figures["finetune"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.thorough
def test_waiting_is_measured_on_disk_and_on_s3(tmp_path: Path) -> None:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    figures, text = _run("wait", tmp_path, *TINY, "--stages", "pretrain", "--latency", "5")
    sides = figures["stages"]["pretrain"]
    assert sides["s3"]["losses"] == sides["local"]["losses"]
    assert all(0 <= side["wait_share"] <= 1 for side in sides.values())
    assert "S3 at 5 ms" in text


@pytest.mark.slow
def test_the_loss_of_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tokens", "64", "--shapes", "32x512", "--repeats", "1"]
    figures, _ = _run("gpu_loss", tmp_path, *options)
    for found in figures["shapes"].values():
        losses = [side["loss"] for side in found.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)


@pytest.mark.slow
def test_the_gpu_step_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shape", "tiny", "--row-tokens", "64", "--rows", "2", "--steps", "1"]
    figures, text = _run("gpu_step", tmp_path, *options, "--warm-up", "1", "--peak-tflops", "1")
    for stage in figures["stages"].values():
        assert stage["best"]["outcome"] == "measured"
        assert 0 <= stage["best"]["padding"] < 1
        assert 0 < stage["best"]["flops_per_second"] < 1e12
    assert "on 8 such GPUs would take" in text
