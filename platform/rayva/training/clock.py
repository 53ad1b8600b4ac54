"""How long a rank's own forward passes take, without what it waits for the other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardClock:
    """Adds up the time that `modules` take in their forward passes, in a `with` block.

    None of them may hold another.
    On CUDA it is the device's own time between two events, which wait for nothing.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: Any = None
        self._passes: list[tuple[Any, Any]] = []
        self._hooks: list[RemovableHandle] = []
        for module in modules:
            self._hooks.append(module.register_forward_pre_hook(self._start))
            self._hooks.append(module.register_forward_hook(self._stop))

    def __enter__(self) -> ForwardClock:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> float:
        """Seconds since the last call. The device must have done what it was given."""
        passes, self._passes = self._passes, []
        if self._cuda:
            return float(sum(start.elapsed_time(stop) for start, stop in passes)) / 1000
        return float(sum(stop - start for start, stop in passes))

    def _start(self, *_: Any) -> None:
        self._open = self._now()

    def _stop(self, *_: Any) -> None:
        self._passes.append((self._open, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
