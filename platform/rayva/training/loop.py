"""The training loop of both stages. It runs under Ray Train, torchrun, or in one plain process."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from rayva.errors import TrainingError
from rayva.model.freeze import apply_freeze_policy
from rayva.model.isolation import agree_on_batches
from rayva.model.lora import add_adapters
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Stage
from rayva.training.checkpoint import Progress
from rayva.training.dataset import SampleSource
from rayva.training.engine import Engine
from rayva.training.meter import Meter
from rayva.training.plan import TrainingPlan
from rayva.training.precision import resolve_precision
from rayva.training.prefetch import VISITED, Ahead, PreparedStep, Share, prefetch
from rayva.training.resume import FAILED, Hooks, Metrics, Saver, restore, saved_dtype
from rayva.training.schedule import lr_factor
from rayva.training.stop import stop_on_sigterm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One stage. `digest` identifies it: a checkpoint of another one is refused."""

    model: VisionLanguageModel
    source: SampleSource
    plan: TrainingPlan
    stage: Stage
    device: torch.device
    digest: str
    ahead: Ahead = field(default_factory=Ahead)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained model under its engine, and figures of the whole stage, interrupted attempts included."""

    engine: Engine
    counts: dict[str, int]
    final: Metrics
    precision: str


def train(job: TrainJob, hooks: Hooks) -> TrainResult:
    """Trains a stage from its newest sound checkpoint, or from the beginning, to its end.

    The process group must have been joined (`init_distributed`). The loss of a step is the sum over
    the supervised tokens of the global batch divided by their number, whatever the world size and
    the micro-batch size. Raises `TrainingError` when it is not finite.
    """
    stage, plan = job.stage, job.plan
    dtype, why = resolve_precision(stage.precision, job.device)
    saved = saved_dtype(hooks, job.digest) if stage.precision == "auto" else None
    if saved is not None and saved != dtype:
        # Machines of another kind than those before: what was trained is worth more than their speed.
        dtype, why = saved, "the checkpoint was trained so"
    logger.info("precision %s: %s", dtype, why)
    # Compiled layers are not narrowed: positions that differ from batch to batch do not go through them.
    layout = agree_on_batches(job.model, stage.packing, narrow=not stage.compile)
    share = Share(dist.get_rank(), dist.get_world_size(), stage.micro_batch_size, layout)
    torch.manual_seed(stage.seed)
    if stage.lora.r:
        add_adapters(job.model.language, stage.lora)
    apply_freeze_policy(job.model, stage.train)
    vision_hidden = job.model.vision_hidden
    micro_batches = plan.micro_batches(share.world_size, share.micro)
    meter = Meter(job.model, dtype, job.device)
    engine = Engine(job.model, stage, micro_batches, dtype, job.device)
    fresh = Progress(0, share.world_size, engine.zero, str(dtype), job.digest)
    state = restore(engine, hooks, fresh)
    counts, metrics = Counter(state.counts), Metrics()
    saver = Saver(engine, hooks, stage, plan.steps_total)
    reading = prefetch(state.step, plan, job.source, share, vision_hidden, job.ahead)
    with closing(saver), stop_on_sigterm(), meter.watching(engine), reading as steps:
        meter.start()
        for prepared, waited in steps:
            metrics = _run_step(engine, prepared, job)
            counts.update(prepared.counts)
            metrics |= meter.read(engine, prepared, waited)
            metrics[FAILED] = float(counts[FAILED])
            # Over the whole stage so far, with a mix.
            metrics |= {name: float(count) for name, count in counts.items() if name.startswith(VISITED)}
            meter.start()
            done = prepared.step + 1
            progress = replace(fresh, step=done, counts=dict(counts))
            hooks.on_metrics(done, metrics)
            counts = Counter(saver.after_step(progress, metrics).counts)
        counts.update({FAILED: saver.settle()})
    return TrainResult(engine, dict(counts), metrics, f"{dtype}".removeprefix("torch.") + f" ({why})")


def _run_step(engine: Engine, prepared: PreparedStep, job: TrainJob) -> Metrics:
    """One optimizer step; its metrics are global and the same on every rank."""
    stage = job.stage
    _seed_generators(stage.seed, prepared.step, engine.rank)
    # A global batch without any supervised token has a loss and a gradient of zero.
    denominator = max(1, prepared.supervised)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for index, batch in enumerate(prepared.micro_batches):
        if index:
            engine.accumulate()
        loss_sum, _ = engine.loss_sum(batch)
        total += loss_sum.detach()
        engine.backward(loss_sum / denominator)
    loss = engine.reduce_sum([total.item()])[0] / denominator
    _require_finite("loss", loss, prepared)
    factor = lr_factor(prepared.step, job.plan.steps_total, stage.warmup_ratio, stage.schedule)
    norm = engine.update(factor)
    _require_finite("gradient's norm", norm, prepared)
    rates = {"lr": stage.lr, "projector_lr": stage.projector_lr, "embedding_lr": stage.embedding_lr}
    return {
        "loss": loss,
        **{name: rate * factor for name, rate in rates.items() if rate is not None},
        "grad_norm": norm,
        "supervised_tokens": float(prepared.supervised),
        "epoch": job.plan.epochs_after(prepared.step),
    }


def _require_finite(what: str, value: float, prepared: PreparedStep) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"The {what} is {value} in step {prepared.step}, whose samples are: "
            + ", ".join(prepared.sample_ids),
            "Look at these samples; a lower learning rate, a longer warm-up or precision=float32 may help "
            "too. Started again, training goes on from the last checkpoint.",
        )


def _seed_generators(seed: int, step: int, rank: int) -> None:
    """Makes all random choices of a step (dropout) a function of (seed, step, rank): no state to save."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
