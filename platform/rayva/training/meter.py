"""What a step took: speed, waiting, memory, and which rank holds up the others."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rayva.model.vlm import VisionLanguageModel
from rayva.training.clock import ForwardClock
from rayva.training.engine import Engine
from rayva.training.flops import ModelFlops, peak_flops
from rayva.training.prefetch import PreparedStep
from rayva.training.resume import Metrics


class Meter:
    """Times steps. To be made before the engine, which may spread the parameters over the ranks."""

    def __init__(self, model: VisionLanguageModel, dtype: torch.dtype, device: torch.device) -> None:
        self._flops, self._device = ModelFlops.of(model), device
        self._peak = peak_flops(device, dtype)
        self._started = 0.0
        self._clock: ForwardClock | None = None

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Times this rank's own work meanwhile; with one rank there is nobody to compare it with."""
        if engine.world_size == 1:
            yield
            return
        with ForwardClock(engine.modules_without_others(), self._device) as self._clock:
            yield

    def start(self) -> None:
        """Before waiting for a step's data."""
        self._started = time.monotonic()

    def read(self, engine: Engine, prepared: PreparedStep, waited: float) -> Metrics:
        """Figures of the global step, the same on every rank.

        Tokens are real ones; `seconds` and `wait_share` are means over the ranks, `memory_bytes` the most
        that any has had so far (CUDA: allocated; else: resident). `slowest_share` is the slowest rank's part
        of the time that all ranks waited for data and took for their own forward passes: 1 / ranks where all
        are alike. Backward passes are not in it: there the ranks meet, and all seem as slow as the slowest.
        `tflops` is for one device, `mfu` that over its peak, where that is known.
        """
        seconds = time.monotonic() - self._started
        ranks = engine.world_size
        by_rank = [0.0] * (2 * ranks)
        by_rank[engine.rank] = waited + (self._clock.take() if self._clock else seconds)
        by_rank[ranks + engine.rank] = float(self._memory())
        totals = engine.reduce_sum([seconds, waited, *by_rank])
        seconds, waited = totals[0] / ranks, totals[1] / ranks
        own, memory = totals[2 : 2 + ranks], totals[2 + ranks :]
        flops = self._flops.step(prepared.lengths, prepared.supervised, prepared.image_tokens)
        metrics = {
            "tokens_per_second": prepared.tokens / seconds,
            "samples_per_second": len(prepared.sample_ids) / seconds,
            "padding_share": 1 - prepared.tokens / max(1, prepared.padded_tokens),
            "wait_share": waited / seconds,
            "seconds": seconds,
            "memory_bytes": max(memory),
            "slowest_rank": float(own.index(max(own))),
            "slowest_share": max(own) / sum(own),
            "tflops": flops / seconds / ranks / 1e12,
        }
        if self._peak is not None:
            metrics["mfu"] = flops / seconds / ranks / self._peak
        return metrics

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
