"""Which settings `gpu_step.py` tries, one after the other, and which is the best. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gpu_shapes import SHAPES
from lengths import StageName

Trial = dict[str, Any]
_STATE_BYTES = 16
"""A trained parameter with its gradient, fp32 copy and moments."""
_SMALLER = 0.85
_LARGEST_ROWS = 64


class Search:
    """Tries attention and compilation first, then rows at once, then recomputation; keeps every trial.

    `run_trial` returns None once the time is over; the search then ends with what it has.
    """

    def __init__(
        self,
        stage: StageName,
        options: argparse.Namespace,
        device: dict[str, Any],
        run_trial: Callable[[Trial], Trial | None],
    ) -> None:
        self.trials: list[Trial] = []
        self._stage, self._options, self._run_trial = stage, options, run_trial
        self._shape = SHAPES[options.shape]
        self._memory = device["memory"] if options.device == "cuda" else None
        self._over = False

    @property
    def best(self) -> Trial | None:
        """The measured trial with the highest MFU."""
        measured = [trial for trial in self.trials if trial["outcome"] == "measured"]
        return max(measured, key=lambda trial: float(trial["flops_per_second"]), default=None)

    def run(self) -> list[Trial]:
        """All trials, in order."""
        on_gpu = self._options.device == "cuda"
        kinds = self._options.attention or (["varlen", "flex"] if on_gpu else ["sdpa"])
        compiled = on_gpu and not self._options.no_compile
        for attention in kinds:
            self._fit(attention=attention, compile=compiled, rows=self._options.rows, recompute=0.0)
        if not on_gpu:
            return self.trials
        if compiled and self.best:
            self._try(**self._like_best(compile=False))
        self._more_rows()
        if self.best:
            self._fit(**self._like_best(rows=2 * self.best["rows"], recompute=1.0), whole=True)
            self._fit(**self._like_best(recompute=0.5), whole=True)
        return self.trials

    def _like_best(self, **changes: Any) -> dict[str, Any]:
        assert self.best is not None
        keys = ("attention", "compile", "rows", "recompute", "depth")
        return {key: self.best[key] for key in keys} | changes

    def _more_rows(self) -> None:
        """Doubles the rows as long as that is faster; stage 2 pays for them with layers, so it tries once."""
        while self.best and self.best["rows"] < _LARGEST_ROWS and not self._over:
            before = self.best
            changed = self._like_best(rows=2 * before["rows"])
            trial = self._fit(**changed) if self._stage == "finetune" else self._try(**changed)
            if trial is None or self.best is before:
                return

    def _fit(self, whole: bool = False, **settings: Any) -> Trial | None:
        """Tries with fewer layers (stage 2) or fewer rows (stage 1) until it fits the memory."""
        depth = self._shape.layers
        if self._stage == "finetune":
            depth = self._first_depth(settings["rows"], settings["recompute"])
        while True:
            trial = self._try(**settings | {"depth": depth})
            if trial is None or trial["outcome"] != "out of memory":
                return trial
            if self._stage == "finetune" and depth > 1:
                depth = max(1, min(depth - 1, int(depth * _SMALLER)))
            elif settings["rows"] > 1 and not whole:
                settings["rows"] //= 2
            else:
                return trial

    def _first_depth(self, rows: int, recompute: float) -> int:
        """The depth that should fit by an estimate of memory, a little too many rather than too few."""
        if self._options.depth or self._memory is None:
            return int(self._options.depth or self._shape.layers)
        shape, tokens = self._shape, rows * self._options.row_tokens
        kept = tokens * 2 * (8 * shape.hidden + 3 * shape.intermediate)  # activations of one layer, bf16
        layer = _STATE_BYTES * shape.layer_parameters + kept * (1 - recompute)
        fixed = _STATE_BYTES * 2 * shape.vocabulary * shape.hidden + kept + 1e9
        return max(1, min(shape.layers, int((self._memory - fixed) / layer)))

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What a trial was started with."""
        keys = {*self._common(), "attention", "compile", "rows", "recompute"}
        return {key: value for key, value in trial.items() if key in keys}

    def _common(self) -> dict[str, Any]:
        options = self._options
        return {
            "stage": self._stage, "row_tokens": options.row_tokens, "steps": options.steps,
            "warm_up": options.warm_up, "text_scale": options.text_scale, "depth": self._shape.layers,
        }  # fmt: skip

    def _try(self, **settings: Any) -> Trial | None:
        wanted = self._common() | settings
        if any(all(trial[key] == value for key, value in wanted.items()) for trial in self.trials):
            return None
        trial = self._run_trial(wanted)
        if trial is None:
            self._over = True
            return None
        self.trials.append(trial)
        return trial
