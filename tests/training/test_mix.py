"""A mix of datasets: visits by weight, every pass exactly once, and any step without those before it."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayva.errors import DataError, RecipeError
from rayva.training.audit import audit
from rayva.training.plan import KeyedPermutation, Part, TrainingPlan
from rayva.training.prefetch import Layout, Share, prepare_step
from tests.training.support import VISION_HIDDEN, tiny_samples, tiny_source

ROOT = Path(__file__).resolve().parents[2]
weights = st.one_of(st.integers(1, 4).map(float), st.floats(0.05, 4.0))
parts = st.lists(st.tuples(st.integers(1, 60), weights), min_size=1, max_size=5)


def _plan(
    sizes: list[tuple[int, float]],
    batch: int = 16,
    epochs: float = 1.0,
    seed: int = 0,
    digest: str = "digest",
) -> TrainingPlan:
    made = [Part(f"d{number}", size, weight) for number, (size, weight) in enumerate(sizes)]
    return TrainingPlan.mixed(made, batch, epochs, seed, digest)


def _by_part(plan: TrainingPlan, steps: range) -> list[list[int]]:
    """Sample numbers within each part, in the order of their visits."""
    found: list[list[int]] = [[] for _ in plan.parts]
    ends = np.cumsum([part.samples for part in plan.parts])
    for step in steps:
        for index in plan.global_batch(step):
            part = int(np.searchsorted(ends, index, side="right"))
            found[part].append(index - int(ends[part]) + plan.parts[part].samples)
    return found


@given(sizes=parts, batch=st.integers(5, 90), epochs=st.integers(1, 3), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_the_visits_of_the_weights_and_every_pass_each_sample_once(
    sizes: list[tuple[int, float]], batch: int, epochs: int, seed: int
) -> None:
    assume(all(round(size * weight) >= 1 for size, weight in sizes))
    plan = _plan(sizes, batch, epochs, seed)
    assert plan.steps_total == epochs * math.ceil(sum(round(n * w) for n, w in sizes) / batch)
    seen = [Counter[int]() for _ in sizes]
    for epoch in range(epochs):
        own = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        for number, (visited, (size, weight)) in enumerate(zip(_by_part(plan, own), sizes, strict=True)):
            assert len(visited) == round(size * weight)
            seen[number].update(visited)
            # After v visits every sample has been seen v // size times, and some once more.
            passes, rest = divmod((epoch + 1) * round(size * weight), size)
            counts = [seen[number][sample] for sample in range(size)]
            assert Counter(counts) == Counter({passes: size - rest, passes + 1: rest}) - Counter()
    assert all(not one.faults for one in audit(plan))


@given(sizes=parts, batch=st.integers(5, 90), epochs=st.floats(0.05, 3.5), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_any_step_is_found_without_those_before_it(
    sizes: list[tuple[int, float]], batch: int, epochs: float, seed: int
) -> None:
    assume(all(round(size * weight) >= 1 for size, weight in sizes))
    assume(round(epochs * sum(round(size * weight) for size, weight in sizes)) >= 1)
    plan = _plan(sizes, batch, epochs, seed)
    in_order = [plan.global_batch(step) for step in range(plan.steps_total)]
    assert sum(map(len, in_order)) == plan.samples_total
    assert not any(one.faults for one in audit(plan)), "a fractional last epoch repeats nothing, either"
    assert all(0 < len(found) <= batch for found in in_order)
    steps = list(range(plan.steps_total))
    random.Random(seed).shuffle(steps)
    assert all(plan.global_batch(step) == in_order[step] for step in steps)
    assert [_plan(sizes, batch, epochs, seed).global_batch(step) for step in steps[:5]] == [
        in_order[step] for step in steps[:5]
    ]


@given(size=st.integers(1, 200), batch=st.integers(1, 50), epochs=st.floats(0.3, 2.5), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_one_dataset_of_weight_one_is_the_plan_without_a_mix(
    size: int, batch: int, epochs: float, seed: int
) -> None:
    assume(round(epochs * size) >= 1)
    alone = TrainingPlan(size, batch, epochs, seed, "digest")
    mixed = _plan([(size, 1.0)], batch, epochs, seed)
    assert mixed.steps_total == alone.steps_total
    assert all(mixed.global_batch(step) == alone.global_batch(step) for step in range(alone.steps_total))


def test_batches_of_earlier_versions_stay_what_they_were() -> None:
    """Checkpoints go on by these numbers."""
    plan = TrainingPlan(10, 4, 1.5, 0, "digest")
    assert plan.global_batch(0) == [8, 9, 4, 6]
    assert plan.global_batch(3) == [6, 1, 4, 3]
    large = TrainingPlan(10**10, 3, 1, 7, "digest")
    assert large.global_batch(12345) == [8537708590, 4943713457, 401714663]


def test_a_half_weight_shows_the_other_half_in_the_next_epoch() -> None:
    plan = _plan([(40, 0.5), (30, 1.0)], 10, 4)
    halves = [set(_by_part(plan, range(5 * epoch, 5 * epoch + 5))[0]) for epoch in range(4)]
    assert all(len(half) == 20 for half in halves)
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(40))
    assert halves[0] != halves[2], "each pass has an order of its own"


def test_datasets_are_mixed_evenly_and_orders_differ_by_seed_epoch_and_digest() -> None:
    plan = _plan([(4000, 1.0), (1000, 2.0), (8000, 0.5)], 100, 2)
    first = [plan.visited(plan.global_batch(step)) for step in range(plan.steps_per_epoch)]
    for name, expected in (("d0", 40), ("d1", 20), ("d2", 40)):
        shares = [counts[name] for counts in first]
        # A batch of 100 drawn without order: mean as the weights say, deviation of a hypergeometric draw.
        deviation = math.sqrt(expected * (1 - expected / 100))
        assert np.mean(shares) == expected
        assert 0.7 * deviation < np.std(shares) < 1.3 * deviation
        assert max(abs(share - expected) for share in shares) < 5 * deviation
    others = [
        plan.global_batch(0),
        plan.global_batch(plan.steps_per_epoch),
        _plan([(4000, 1.0), (1000, 2.0), (8000, 0.5)], 100, 2, seed=1).global_batch(0),
        _plan([(4000, 1.0), (1000, 2.0), (8000, 0.5)], 100, 2, digest="other").global_batch(0),
    ]
    assert len({tuple(order) for order in others}) == 4


def test_a_mix_of_ten_thousand_million_samples_is_looked_up_at_once() -> None:
    plan = _plan([(10**10, 1.0), (3 * 10**9, 2.5), (1000, 1000.5)], 4096, 3)
    for step in (0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch, plan.steps_total - 1):
        batch = plan.global_batch(step)
        assert min(batch) >= 0
        assert max(batch) < plan.num_samples
        assert sum(plan.visited(batch).values()) == len(batch)
    share = plan.visited(plan.global_batch(7))["d0"] / 4096
    assert abs(share - 10 / 17.5) < 0.05
    # State grows with the datasets, not with their samples.
    held = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) < 1000


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("micro", "layout"), [(1, "padded"), (4, "rows"), (4, "flat")])
def test_steps_of_a_mix_are_the_same_however_the_work_is_split(
    world: int, micro: int, layout: Layout
) -> None:
    plan, source = _plan([(18, 1.0), (12, 1.5)], 8, 2), tiny_source(30)
    for step in (0, 4, 8):
        ids = [source.sample_id(index) for index in plan.global_batch(step)]
        ranks = [
            prepare_step(step, plan, source, Share(rank, world, micro, layout), VISION_HIDDEN)
            for rank in range(world)
        ]
        assert all(rank.sample_ids == ids for rank in ranks)
        assert all(rank.counts["visited/d0"] + rank.counts["visited/d1"] == len(ids) for rank in ranks)
        own = sum(int((b.labels_BT[:, 1:] != -100).sum()) for rank in ranks for b in rank.micro_batches)
        if layout == "padded":
            assert own == ranks[0].supervised


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_weight_is_a_clear_error(weight: float) -> None:
    with pytest.raises(RecipeError, match="weight of dataset 'mine'"):
        Part("mine", 10, weight)


def test_a_dataset_without_samples_or_visits_is_named() -> None:
    with pytest.raises(DataError, match="'mine'"):
        Part("mine", 0)
    with pytest.raises(RecipeError, match="raise its weight"):
        Part("mine", 10, 0.04)


def test_the_audit_finds_what_was_broken() -> None:
    class Repeating(TrainingPlan):
        def global_batch(self, step: int) -> list[int]:
            return super().global_batch(0 if step == 1 else step)

    class Short(TrainingPlan):
        def global_batch(self, step: int) -> list[int]:
            return super().global_batch(step)[: 3 if step == 1 else None]

    made = (Part("a", 20), Part("b", 10, 1.5))
    for broken in (Repeating, Short):
        found = audit(broken.mixed(made, 5, 2, 0, "digest"))
        assert any("dataset" in fault for one in found for fault in one.faults)
    assert not any(one.faults for one in audit(TrainingPlan.mixed(made, 5, 2.4, 0, "digest")))
    (only,) = audit(TrainingPlan(9, 4, 1, 0, "digest"))
    assert (only.steps, only.visits, only.faults) == (3, {"": 9}, [])
    assert audit(Repeating(9, 4, 1, 0, "digest"))[0].faults


POWERS = sorted({max(1, 2**bits + off) for bits in range(0, 15) for off in (-1, 0, 1)})


@pytest.mark.parametrize("key", ["", "a key"])
def test_a_permutation_is_a_bijection_around_powers_of_two(key: str) -> None:
    for size in POWERS:
        images = KeyedPermutation(size, key)(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size)), size


@pytest.mark.parametrize("size", [10**10, 2**34, 2**40 + 1])
def test_large_permutations_repeat_nothing_in_large_windows(size: int) -> None:
    permutation = KeyedPermutation(size, "key")
    windows = [0, size // 3, size - 100_000]
    images = permutation(np.concatenate([np.arange(start, start + 100_000) for start in windows]))
    assert len(np.unique(images)) == len(images)
    assert images.min() >= 0
    assert images.max() < size
    # Evenly spread: chi-square over 100 cells has mean 99 and deviation 14.
    cells = np.bincount(images // (size // 100 + 1), minlength=100)
    assert ((cells - 3000) ** 2 / 3000).sum() < 99 + 6 * 14


def test_a_sample_comes_anywhere_in_an_epoch() -> None:
    """Where one and the same sample comes, over many epochs, is evenly spread."""
    places = [
        int(np.flatnonzero(KeyedPermutation(16, f"k{key}")(np.arange(16)) == 5)[0]) for key in range(3200)
    ]
    counts = np.bincount(places, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 15 + 6 * math.sqrt(30)


def test_the_plan_needs_neither_torch_nor_ray() -> None:
    code = "import sys, rayva.training.audit; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def test_a_table_tells_the_sizes_of_its_datasets() -> None:
    assert tiny_source(30).sizes() == {"": 30}
    table = tiny_samples(30).drop(["dataset"])
    source = tiny_source(30)
    source._samples = table
    assert source.sizes() == {"": 30}, "a table of an earlier version"
    names = ["z"] * 10 + ["a"] * 20
    source._samples = table.append_column("dataset", pa.array(names))
    assert list(source.sizes().items()) == [("z", 10), ("a", 20)]
    source.leave_out(np.arange(30) < 4, "too_short")
    assert source.sizes() == {"z": 6, "a": 20}
    assert source.left_out["too_short"] == 4
    source._samples = table.append_column("dataset", pa.array(names[::-1][:15] + names[:15]))
    with pytest.raises(ValueError, match="together"):
        source.sizes()
