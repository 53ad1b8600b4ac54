"""Bootstrap intervals of figures that are ratios of sums, paired over questions.

Questions are drawn with replacement, the same ones for every run, so that what makes a question hard for all
runs alike does not blur their difference (Efron; paired bootstrap of Koehn 2004).
Shapes: R runs of a judge, N questions, S resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its percentile interval; all None where nothing is defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Parts:
    """Numerators and denominators [R, N] of one run's figure."""

    over_RN: Floats
    under_RN: Floats

    def figure(self) -> float:
        """The figure itself: the mean over runs of sum / sum; nan where no sum is defined."""
        return float(_ratios(np.ones((1, self.over_RN.shape[1])), self)[0])


def _ratios(weights_SN: Floats, parts: Parts) -> Floats:
    """The figure of each resample [S]; a run whose denominator is zero takes no part in the mean."""
    over_SR = weights_SN @ parts.over_RN.T
    under_SR = weights_SN @ parts.under_RN.T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios_SR = np.where(under_SR != 0, over_SR / under_SR, np.nan)
    defined_S = (~np.isnan(ratios_SR)).sum(axis=1)
    sums_S = np.nansum(ratios_SR, axis=1)
    return np.where(defined_S > 0, sums_S / np.maximum(defined_S, 1), np.nan)


def resampled(parts: Sequence[Parts], resamples: int, seed: int) -> list[Floats]:
    """The figure of each run under each resample [S]; the same questions are drawn for all runs."""
    if not parts:
        return []
    sizes = {part.over_RN.shape[1] for part in parts}
    if len(sizes) != 1:
        raise ValueError(f"runs of {sorted(sizes)} questions are not paired")
    pieces = [
        [_ratios(weights_SN, part) for part in parts] for weights_SN in _draws(sizes.pop(), resamples, seed)
    ]
    return [np.concatenate(column) for column in zip(*pieces, strict=True)]


def _draws(questions: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each question is drawn [S, N], some resamples at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, questions))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        yield generator.multinomial(questions, np.full(questions, 1 / questions), size).astype(np.float64)


def interval(value: float, samples_S: Floats, level: float) -> Estimate:
    """The percentile interval around a value."""
    defined_S = samples_S[~np.isnan(samples_S)]
    if np.isnan(value) or not len(defined_S):
        return Estimate(None, None, None)
    low, high = np.quantile(defined_S, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
