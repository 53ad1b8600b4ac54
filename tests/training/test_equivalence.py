"""Losses are those of a plain loop, however the work is split: workers, micro-batches, packing, ZeRO."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from rayva.model.batch import collate
from rayva.training.loop import TrainJob, train
from tests.training.support import FolderHooks, scenes_job, tiny_job

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {"lr": 2e-3, "epochs": 1.5, "checkpoint_every": 1000}
STEPS = 50
SCENES: dict[str, Any] = {"lr": 1e-3, "projector_lr": 4e-3, "batch_size": 8, "checkpoint_every": 1000}
MATRIX = [
    {"micro_batch_size": micro, "packing": packing, "zero": zero, **SCENES}
    for micro, packing, zero in product([1, 4], [True, False], [0, 2, 3])
]


def _reference(job: TrainJob) -> tuple[list[float], list[list[str]], dict[str, torch.Tensor]]:
    """One sample at a time, full logits, torch's AdamW and HF's schedule: nothing of the engine.

    Losses and sample ids of each step, and the final weights.
    """
    stage, plan, model = job.stage, job.plan, job.model
    groups = [
        {"params": list(model.projector.parameters()), "lr": stage.projector_lr or stage.lr},
        {"params": list(model.language.parameters()), "lr": stage.lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, weight_decay=0.0)
    warmup = -(-plan.steps_total * 3 // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, plan.steps_total)
    losses, ids = [], []
    for step in range(plan.steps_total):
        epoch = plan.epoch_of(step)
        examples = [job.source.example(index, epoch, Counter()) for index in plan.global_batch(step)]
        batches = [collate(job.source.rows([e]), model.vision_hidden) for e in examples if e is not None]
        count = sum(int((batch.labels_BT[:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            logits = model.language(inputs_embeds=model.embed(batch)).logits
            flat, labels = logits[0, :-1], batch.labels_BT[0, 1:]
            total = total + functional.cross_entropy(flat, labels, reduction="sum", ignore_index=-100)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
        ids.append([example.sample_id for example in examples if example is not None])
    return losses, ids, dict(model.state_dict())


@pytest.mark.parametrize(
    "split",
    [
        {"micro_batch_size": 1, "zero": 0}, {"micro_batch_size": 4, "zero": 2},
        {"micro_batch_size": 4, "zero": 0, "packing": False},
        {"micro_batch_size": 2, "zero": 1, "offload": True},
        {"micro_batch_size": 2, "zero": 3, "offload": True},
        {"micro_batch_size": 2, "gradient_checkpointing": True},
        {"micro_batch_size": 2, "zero": 3, "gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_one_worker_equals_a_plain_loop(split: dict[str, Any], process_group: None, tmp_path: Path) -> None:
    settings = COMMON | split
    losses, _, weights = _reference(tiny_job(**settings))
    hooks = FolderHooks(tmp_path)
    result = train(tiny_job(**settings), hooks)
    assert [metrics["loss"] for metrics in hooks.metrics] == pytest.approx(losses, rel=1e-5)
    gathered = result.engine.gather(result.engine.model)
    assert gathered is not None
    for name, expected in weights.items():
        torch.testing.assert_close(gathered[name], expected, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_model_has_the_same_losses(recomputed: bool, process_group: None, tmp_path: Path) -> None:
    settings = COMMON | {"micro_batch_size": 4, "zero": 2, "gradient_checkpointing": recomputed}
    losses = []
    for compiled in (False, True):
        hooks = FolderHooks(tmp_path / str(compiled))
        job = tiny_job(**settings, compile=compiled)
        train(job, hooks)
        losses.append([metrics["loss"] for metrics in hooks.metrics])
        layers = job.model.language.base_model.layers
        assert [layer._compiled_call_impl is not None for layer in layers] == [compiled] * 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.fixture(scope="module")
def scenes_reference() -> tuple[list[float], list[list[str]], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    return _reference(scenes_job(STEPS, **SCENES))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.thorough)])
def test_fifty_steps_equal_a_plain_loop_however_the_work_is_split(
    world_size: int,
    scenes_reference: tuple[list[float], list[list[str]], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """fp32, drawn scenes: losses to 1e-5, and the same samples in the same steps on every rank."""
    losses, ids, _ = scenes_reference
    assert losses[-1] < 0.8 * losses[0]  # it learns: the losses compared are of a training that moves
    for result in _run_ranks(world_size, MATRIX, tmp_path):
        for settings, (own, seen) in zip(MATRIX, result, strict=True):
            assert own == pytest.approx(losses, rel=1e-5), settings
            assert seen == ids, settings


def _run_ranks(world_size: int, settings: list[dict[str, Any]], folder: Path) -> list[Any]:
    """What `tests.training.rank` tells on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training.rank", json.dumps(settings), str(STEPS), str(folder)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=500) for rank in ranks] == [0] * world_size
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(world_size)]
