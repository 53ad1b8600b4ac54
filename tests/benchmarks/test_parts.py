"""What the benchmarks' figures rest on: lengths, FLOPs, the search for settings, packed attention."""

from __future__ import annotations

import argparse
import importlib
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"bench_support", "lengths", "gpu_shapes", "gpu_search", "gpu_trial"}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ as the scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def test_lengths_have_the_distributions_mean_at_any_size(part: Any) -> None:
    lengths = part("lengths")
    for stage, (median, sigma) in lengths.TEXT_LENGTHS.items():
        mean = median * math.exp(sigma**2 / 2)
        for count in (64, 1000):
            assert sum(lengths.quantile_lengths(stage, count)) / count == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(("stage", "depth"), [("pretrain", 3), ("finetune", 2)])
def test_flops_are_those_that_torch_counts(part: Any, stage: str, depth: int) -> None:
    trial, shape = part("gpu_trial"), part("gpu_shapes").SHAPES["tiny"]
    model = trial._model(shape, depth, "sdpa", "cpu").float()
    trial.apply_freeze_policy(model, "projector" if stage == "pretrain" else "all")
    rng, length = random.Random(0), 64
    rows = [[trial._row(stage, length, shape, rng)] for _ in range(2)]
    batch = trial.collate_packed(rows, shape.vision_hidden)
    supervised = int((batch.labels_BT[:, 1:] != -100).sum())
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(batch)
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "attention" in str(op) or "bmm" in str(op))
    products = sum(counts.values()) - attention
    ours = shape.flops(stage, depth, [length] * 2, supervised, 2)
    ours_attention = 6 * depth * shape.hidden * 2 * length**2
    assert products == ours - ours_attention


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_rows_without_a_mask_have_the_loss_of_rows_with_one(
    part: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    trial, shape = part("gpu_trial"), part("gpu_shapes").SHAPES["tiny"]
    monkeypatch.setattr(trial, "_DTYPE", torch.float32)
    work: dict[str, Any] = {"stage": stage, "device": "cpu", "rows": 2, "row_tokens": 128, "text_scale": 0.2}
    losses, shapes = [], set()
    for attention in ("varlen", "sdpa"):
        torch.manual_seed(0)
        model = trial._model(shape, 3, attention, "cpu")
        torch.nn.init.normal_(model.language.lm_head.weight)
        for number in range(2):
            torch.manual_seed(number)
            packed = trial._batch(work | {"attention": attention}, shape, random.Random(number))
            assert len(packed.lengths) > work["rows"]
            shapes.add(tuple(packed.batch.input_ids_BT.shape))
            losses.append(model(packed.batch)[0].item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    assert losses[0] != losses[1]
    assert shapes == {(1, 256), (2, 128)}


def test_master_weights_move_as_adamw_in_fp32_does(part: Any) -> None:
    trial = part("gpu_trial")
    start = torch.randn(64, 8).bfloat16()
    parameter, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizer = trial.MasterAdamW([parameter], lr=1e-4)
    reference = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for step in range(20):
        grad = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)).bfloat16() * 1e-3
        parameter.grad, plain.grad = grad.clone(), grad.float()
        optimizer.step(max_norm=1.0)
        reference.step()
    assert torch.equal(parameter, plain.bfloat16())
    assert not torch.equal(parameter, start)


def _options(**changes: Any) -> argparse.Namespace:
    common: dict[str, Any] = {
        "device": "cuda", "shape": "7b", "row_tokens": 2048, "rows": 4, "depth": None, "attention": None,
        "no_compile": False, "steps": 1, "warm_up": 1, "text_scale": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**(common | changes))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_search_ends_with_the_fastest_that_fits(part: Any, stage: str) -> None:
    """A made-up GPU: memory by layers and rows, speed by rows and compilation, and no flex attention."""

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        if settings["attention"] == "flex":
            return settings | {"outcome": "failed: no such kernel"}
        each = (3.2 if stage == "finetune" else 0.4) + settings["rows"] * 0.3 * (1 - settings["recompute"])
        if settings["depth"] * each + 12 > 80:
            return settings | {"outcome": "out of memory"}
        speed = settings["rows"] / (settings["rows"] + 2) * (1 + settings["compile"])
        return settings | {"outcome": "measured", "flops_per_second": speed / (1 + settings["recompute"] / 8)}

    search = part("gpu_search").Search(stage, _options(), {"memory": 80 * 2**30}, run)
    trials = search.run()
    assert trials[0]["attention"] == "varlen"
    assert search.best is not None
    assert search.best["compile"]
    assert search.best["flops_per_second"] == max(t.get("flops_per_second", 0) for t in trials)
    assert search.best["rows"] > 4
    assert any(trial["outcome"] == "out of memory" for trial in trials)
    assert any(not trial["compile"] for trial in trials)
    assert {trial["recompute"] for trial in trials} == {0.0, 0.5, 1.0}
    assert len(trials) == len({tuple(sorted((k, str(v)) for k, v in t.items())) for t in trials})


def test_the_search_stops_when_its_time_is_over(part: Any) -> None:
    results = iter([{"outcome": "measured", "flops_per_second": 1.0}])

    def run(settings: dict[str, Any]) -> dict[str, Any] | None:
        result = next(results, None)
        return None if result is None else settings | result

    search = part("gpu_search").Search("finetune", _options(), {"memory": 80 * 2**30}, run)
    assert len(search.run()) == 1
    assert search.best is search.trials[0]


@pytest.mark.slow
def test_the_gpu_step_imports_torch_and_transformers_alone() -> None:
    """Everything else that Rayva depends on is made impossible to import."""
    absent = ["pyarrow", "pydantic", "ray", "deepspeed", "fsspec", "mlflow", "PIL"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        # transformers asks for some of them by itself, and does without; Rayva's modules may not.
        "from transformers.models.clip import modeling_clip\n"
        "from transformers.models.llama import modeling_llama\n"
        f"before = set(sys.modules)\nimport gpu_trial, gpu_search\n"
        f"late = {{name.split('.')[0] for name in set(sys.modules) - before}}\n"
        f"assert 'rayva' in late and not late & set({absent!r}), late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
