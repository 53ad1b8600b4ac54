"""Figures of a step: the operations that it needs, and speed, padding, waiting and the slowest rank."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from rayva.model.batch import collate
from rayva.model.freeze import apply_freeze_policy
from rayva.model.isolation import narrow_last_mlp
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IMAGE_TOKEN_INDEX
from rayva.training.clock import ForwardClock
from rayva.training.flops import ModelFlops, peak_of
from rayva.training.loop import train
from tests.elastic.support import PATIENCE_SECONDS, start_ranks
from tests.training.support import FolderHooks, tiny_job


@pytest.mark.parametrize("narrowed", [False, True])
@pytest.mark.parametrize("trained", ["projector", "all"])
def test_operations_are_those_that_torch_counts(trained: Literal["projector", "all"], narrowed: bool) -> None:
    """Attention apart: torch counts whole squares, and what the mask leaves out is not needed."""
    job = tiny_job(micro_batch_size=1)
    if narrowed:
        assert narrow_last_mlp(job.model)
    apply_freeze_policy(job.model, trained)
    flops = ModelFlops.of(job.model)
    example = next(e for i in range(9) if (e := job.source.example(i, 0, Counter())) and e.image_ids)
    batch = collate(job.source.rows([example]), job.model.vision_hidden)
    with FlopCounterMode(display=False) as counter:
        loss, _ = job.model.loss_sum(batch)
        loss.backward()
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counted.items() if "attention" not in name)
    images = example.input_ids.count(IMAGE_TOKEN_INDEX)
    whole = flops.step([len(example.input_ids)], example.supervised, images)
    ours = whole - flops.pair * len(example.input_ids) ** 2
    assert ours == pytest.approx(products, rel=1e-6)


def test_what_a_step_tells(process_group: None, tmp_path: Path) -> None:
    hooks = FolderHooks(tmp_path)
    train(tiny_job(), hooks)
    for metrics in hooks.metrics:
        assert metrics["samples_per_second"] * metrics["seconds"] == pytest.approx(
            round(metrics["samples_per_second"] * metrics["seconds"])
        )
        assert metrics["tokens_per_second"] > metrics["samples_per_second"]
        assert metrics["padding_share"] == 0  # samples lie one behind the other
        assert 0 <= metrics["wait_share"] < 1
        assert (metrics["slowest_rank"], metrics["slowest_share"]) == (0, 1)
        assert metrics["memory_bytes"] > 2**20
        assert metrics["tflops"] > 0
        assert "mfu" not in metrics  # nobody knows a CPU's peak


class _Event:
    """A CUDA event of a device whose clock goes on by a second with each."""

    recorded = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        type(self).recorded += 1
        self.at = self.recorded

    def elapsed_time(self, later: _Event) -> float:
        return 1000.0 * (later.at - self.at)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_counts_every_forward_pass_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("rayva.training.clock.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    first, second, other = (torch.nn.Linear(2, 2) for _ in range(3))
    with ForwardClock([first, second], torch.device(device)) as clock:
        for _ in range(3):
            second(other(first(torch.ones(1, 2))))
        assert clock.take() == 6  # seconds: one for each pass
        assert clock.take() == 0
        first(torch.ones(1, 2))
    first(torch.ones(1, 2))
    assert clock.take() == 1, "what comes after the block is not timed"


@pytest.mark.slow
def test_the_slow_rank_is_named_though_all_wait_for_it(tmp_path: Path) -> None:
    """Rank 1 of two sleeps in its forward passes; ZeRO 3's ranks meet within them, too."""
    ranks = start_ranks(2, ["[0, 2, 3]", str(tmp_path)], "tests.training.slow_rank")
    assert [rank.wait(timeout=PATIENCE_SECONDS) for rank in ranks] == [0, 0]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    for of_rank in told:
        for of_stage in of_rank:
            assert len(of_stage) == 4
            # The first step loads code.
            assert [metrics["slowest_rank"] for metrics in of_stage[1:]] == [1] * 3
            assert all(metrics["slowest_share"] > 0.8 for metrics in of_stage[1:])


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("Tesla T4", 65.0),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, tflops: float) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert peak / 1e12 == tflops


def test_an_unknown_device_has_no_peak() -> None:
    for name in ("Some Accelerator", "NVIDIA RTX A1000", "Quadro T400"):
        assert peak_of(name) is None


def test_a_token_goes_through_some_of_the_experts() -> None:
    def per_token(experts: int) -> float:
        config = MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2,
        )  # fmt: skip
        model = VisionLanguageModel(MixtralForCausalLM(config), torch.nn.Linear(4, 16))
        return ModelFlops.of(model).token

    router = 6.0 * 16
    assert per_token(8) - 8 * router == pytest.approx(per_token(2) - 2 * router)
