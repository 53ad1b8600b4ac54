"""Bootstrap intervals against a plain reference, and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest

from rayva.evaluation.bootstrap import Parts, interval, resampled

RNG = np.random.default_rng(5)


def accuracy(right: np.ndarray) -> Parts:
    return Parts(right[None].astype(float), np.ones((1, len(right))))


def judged(runs: int, questions: int) -> Parts:
    return Parts(RNG.uniform(1, 10, (runs, questions)), RNG.uniform(5, 10, (runs, questions)))


def reference(parts: Parts, resamples: int, seed: int) -> list[float]:
    """Draws questions one by one with replacement and computes the figure from the drawn list."""
    generator = np.random.default_rng(seed)
    questions = parts.over_RN.shape[1]
    found = []
    for _ in range(resamples):
        drawn = generator.integers(0, questions, questions)
        ratios = [
            sum(over[drawn]) / sum(under[drawn])
            for over, under in zip(parts.over_RN, parts.under_RN, strict=True)
        ]
        found.append(sum(ratios) / len(ratios))
    return found


@pytest.mark.parametrize("parts", [accuracy(RNG.random(80) < 0.7), judged(3, 40)], ids=["binary", "judge"])
def test_intervals_are_those_of_a_plain_loop(parts: Parts) -> None:
    (samples,) = resampled([parts], 4000, seed=1)
    plain = np.array(reference(parts, 4000, seed=2))
    spread = plain.std()
    assert abs(samples.mean() - plain.mean()) < spread / 10
    assert abs(samples.std() / spread - 1) < 0.08
    ours = interval(parts.figure(), samples, 0.95)
    low, high = np.quantile(plain, [0.025, 0.975])
    assert ours.low == pytest.approx(low, abs=spread / 3)
    assert ours.high == pytest.approx(high, abs=spread / 3)


def test_the_figure_is_the_mean_over_runs_of_the_ratio_of_sums() -> None:
    parts = Parts(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[2.0, 4.0], [4.0, 0.0]]))
    assert parts.figure() == pytest.approx((3 / 6 + 3 / 4) / 2)


def test_the_same_questions_are_drawn_for_all_runs() -> None:
    right = RNG.random(200) < 0.5
    better = right.copy()
    better[np.flatnonzero(~right)[:10]] = True
    first, second = resampled([accuracy(right), accuracy(better)], 1000, seed=3)
    assert ((second - first) >= 0).all()  # never worse on any draw, which unpaired draws would not show
    assert (second - first).std() < first.std() / 2
    same, again = resampled([accuracy(right), accuracy(right)], 500, seed=3)
    assert (same == again).all()
    assert (resampled([accuracy(right)], 500, seed=4)[0] != same).any()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for _ in range(300):
        right = RNG.random(120) < 0.6
        parts = accuracy(right)
        found = interval(parts.figure(), resampled([parts], 400, seed=0)[0], 0.9)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 0.83 < covered / 300 < 0.96


def test_undefined_figures_have_no_interval() -> None:
    nothing = Parts(np.zeros((1, 3)), np.zeros((1, 3)))
    assert interval(nothing.figure(), resampled([nothing], 10, 0)[0], 0.95).value is None
    with pytest.raises(ValueError, match="not paired"):
        resampled([accuracy(np.ones(2)), accuracy(np.ones(3))], 10, 0)
