"""The loss depends neither on world size, micro-batch size nor ZeRO: it is that of a plain loop."""

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
from rayva.training.loop import train
from tests.training.support import VISION_HIDDEN, FolderHooks, tiny_job

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {"lr": 2e-3, "epochs": 1.5, "checkpoint_every": 1000}
SPLITS = [{"micro_batch_size": micro, "zero": zero, **COMMON} for micro, zero in product([1, 4], [0, 2])]


def _reference(**settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One sample at a time, full logits, torch's AdamW and HF's schedule: nothing of the engine."""
    job = tiny_job(**settings)
    stage, plan, model = job.stage, job.plan, job.model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=stage.betas, eps=stage.eps, weight_decay=0.0
    )
    warmup = -(-plan.steps_total * 3 // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, plan.steps_total)
    losses = []
    for step in range(plan.steps_total):
        epoch = plan.epoch_of(step)
        examples = [job.source.example(index, epoch, Counter()) for index in plan.global_batch(step)]
        batches = [collate(job.source.rows([e]), VISION_HIDDEN) for e in examples if e is not None]
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
    return losses, dict(model.state_dict())


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    return _reference(**COMMON)


@pytest.mark.parametrize("split", SPLITS)
def test_one_worker_equals_a_plain_loop(
    split: dict[str, Any],
    reference: tuple[list[float], dict[str, torch.Tensor]],
    process_group: None,
    tmp_path: Path,
) -> None:
    hooks = FolderHooks(tmp_path)
    result = train(tiny_job(**split), hooks)
    assert [metrics["loss"] for metrics in hooks.metrics] == pytest.approx(reference[0], rel=1e-5)
    gathered = result.engine.gather(result.engine.model)
    assert gathered is not None
    for name, expected in reference[1].items():
        torch.testing.assert_close(gathered[name], expected, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_two_workers_equal_a_plain_loop(
    reference: tuple[list[float], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    settings = [*SPLITS, {"micro_batch_size": 4, "zero": 3, **COMMON}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": paths,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training.rank", json.dumps(settings), str(tmp_path)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for index, losses in enumerate(first):
        assert losses == pytest.approx(reference[0], rel=1e-5), settings[index]
        gathered = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        for name, expected in reference[1].items():
            torch.testing.assert_close(gathered[name], expected, atol=2e-4, rtol=0)
