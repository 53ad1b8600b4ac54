"""On one CUDA GPU, kernels and the training engine give what the CPU gives. Skipped where there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rayva.model.attention import isolate_samples
from rayva.model.batch import Row, collate, collate_flat
from rayva.model.generate import Sampling, generate_ids
from rayva.model.loss import cross_entropy_sum
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IMAGE_TOKEN_INDEX
from rayva.training.clock import ForwardClock
from rayva.training.flops import peak_flops
from rayva.training.loop import train
from tests.training.support import FolderHooks, scenes_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).resolve().parents[2]
VISION, VOCABULARY, STEPS = 12, 96, 12


def _model(heads: int, kv_heads: int, head_dim: int) -> VisionLanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return VisionLanguageModel(LlamaForCausalLM(config), torch.nn.Linear(VISION, 64))


def _rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for images, text in ((2, 90), (0, 5), (1, 140), (1, 0), (0, 1), (1, 300)):
        ids = torch.randint(3, VOCABULARY, (text,), generator=generator).tolist()
        features = torch.randn(16 * images, VISION, generator=generator) if images else None
        rows.append(Row([IMAGE_TOKEN_INDEX] * 16 * images + ids, [-100] * 16 * images + ids, features))
    return rows


def _loss(model: VisionLanguageModel, device: str, dtype: torch.dtype, flat: bool) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients one behind the other, on the CPU."""
    model = model.to(torch.device(device), dtype)
    if flat:
        assert isolate_samples(model.language)
    rows = _rows()
    batches = [collate_flat(rows, VISION)] if flat else [collate([row], VISION) for row in rows]
    total = torch.stack([model(batch.to(torch.device(device)))[0] for batch in batches]).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return total.detach().cpu(), torch.cat([gradient.flatten().float().cpu() for gradient in gradients])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (4, 2, 32), (2, 1, 64), (1, 1, 128)])
def test_a_flat_row_on_the_gpu_equals_samples_alone(heads: int, kv_heads: int, head_dim: int) -> None:
    shape = (heads, kv_heads, head_dim)
    loss, gradient = _loss(_model(*shape), "cpu", torch.float32, flat=False)
    exact, exact_gradient = _loss(_model(*shape), "cuda", torch.float32, flat=True)
    torch.testing.assert_close(exact, loss, rtol=1e-5, atol=0)
    assert (exact_gradient - gradient).norm() < 1e-4 * gradient.norm()
    fused, fused_gradient = _loss(_model(*shape), "cuda", torch.bfloat16, flat=True)
    torch.testing.assert_close(fused, loss, rtol=5e-3, atol=0)
    assert (fused_gradient - gradient).norm() < 5e-2 * gradient.norm()


def test_the_loss_kernel_on_the_gpu() -> None:
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(64, 40_000, bias=False)
    hidden_SH = torch.randn(1500, 64, generator=generator, requires_grad=True)
    targets_S = torch.randint(0, 40_000, (1500,), generator=generator)
    expected = cross_entropy_sum(hidden_SH, targets_S, head)
    wanted = torch.autograd.grad(expected, [hidden_SH, head.weight])
    head, moved = head.cuda(), hidden_SH.detach().cuda().requires_grad_()
    loss = cross_entropy_sum(moved, targets_S.cuda(), head)
    gradients = torch.autograd.grad(loss, [moved, head.weight])
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.cpu(), reference, rtol=1e-3, atol=1e-5)


def test_forward_passes_are_timed_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own time between two events of each pass, which are only enqueued meanwhile."""
    made: list[Any] = []
    real = torch.cuda.Event

    def event(**settings: Any) -> Any:
        made.append(real(**settings))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    layer = torch.nn.Linear(4096, 4096, device="cuda")
    batch = torch.randn(4096, 4096, device="cuda")
    with ForwardClock([layer], batch.device) as clock:
        for _ in range(20):
            layer(batch)
        torch.cuda.synchronize()
        own = clock.take()
    assert len(made) == 2 * 20
    assert all(one.query() for one in made), "recorded, and come to"
    passes = [start.elapsed_time(stop) / 1000 for start, stop in zip(made[::2], made[1::2], strict=True)]
    assert min(passes) > 0
    assert own == pytest.approx(sum(passes))
    assert clock.take() == 0


def _start(folder: Path, settings: dict[str, Any], *dies_after: int) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "tests.gpu.train_cuda", json.dumps(settings), str(STEPS), str(folder),
        *map(str, dies_after),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}  # this process's own
    return subprocess.run(command, cwd=ROOT, env=env | {"PYTHONPATH": path}, capture_output=True, text=True)


def _train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    done = _start(folder, settings)
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


def _on_cpu(folder: Path, settings: dict[str, Any]) -> list[float]:
    hooks = FolderHooks(folder)
    result = train(scenes_job(STEPS, **settings | {"precision": "float32", "zero": 0}), hooks)
    result.engine.close()
    return [metrics["loss"] for metrics in hooks.metrics]


COMMON = {"lr": 1e-2, "batch_size": 16, "micro_batch_size": 8, "checkpoint_every": 4}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "auto"},
    "padded": {"packing": False},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "offload": {"zero": 2, "offload": True},
    "recomputed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "lora": {"lora": {"r": 4, "alpha": 8}},
    "projector": {"train": "projector"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_on_the_gpu_follows_the_cpu(case: str, tmp_path: Path, process_group: None) -> None:
    settings = COMMON | {"precision": "bfloat16"} | CASES[case]
    told = _train(tmp_path / "gpu", settings)
    on_cpu = {key: value for key, value in settings.items() if key not in {"compile", "offload"}}
    expected = _on_cpu(tmp_path / "cpu", on_cpu)
    losses = [metrics["loss"] for metrics in told["metrics"]]
    assert losses == pytest.approx(expected, rel=1e-3 if case == "float32" else 5e-2)
    assert losses[-1] < losses[0]
    known = peak_flops(torch.device("cuda", 0), torch.bfloat16) is not None and case != "float32"
    assert ("mfu" in told["metrics"][-1]) == known


def test_a_killed_run_goes_on_on_the_gpu(tmp_path: Path) -> None:
    settings = COMMON | {"precision": "bfloat16"}
    whole = [metrics["loss"] for metrics in _train(tmp_path / "whole", settings)["metrics"]]
    assert _start(tmp_path / "killed", settings, 6).returncode == -signal.SIGKILL
    rest = [metrics["loss"] for metrics in _train(tmp_path / "killed", settings)["metrics"]]
    assert len(rest) == STEPS - 4, "it goes on from the checkpoint of step 4"
    # GPU kernels add up in an order of their own.
    assert rest == pytest.approx(whole[4:], rel=1e-2)


def test_greedy_answers_on_the_gpu_are_those_of_the_cpu() -> None:
    rows = [row for row in _rows() if row.features_MD is not None]
    batch = collate(rows, VISION, left=True)
    sampling = Sampling(max_new_tokens=24)
    expected = generate_ids(_model(4, 2, 16).eval(), batch, sampling)
    on_gpu = generate_ids(_model(4, 2, 16).eval().cuda(), batch.to(torch.device("cuda")), sampling)
    assert on_gpu == expected
