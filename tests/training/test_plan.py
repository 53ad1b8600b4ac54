"""The plan: exactly once an epoch, and the same whatever the world size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.errors import DataError, RecipeError
from rayva.training.plan import KeyedPermutation, Part, TrainingPlan, deal, pack
from rayva.training.schedule import lr_factor


@given(size=st.integers(1, 5000), key=st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_keyed_permutation_visits_everything_exactly_once(size: int, key: str) -> None:
    assert sorted(KeyedPermutation(size, key)(np.arange(size))) == list(range(size))


@given(size=st.integers(1, 10**12), start=st.integers(0, 10**12))
@settings(max_examples=50, deadline=None)
def test_an_index_alone_and_in_a_batch_give_the_same_image(size: int, start: int) -> None:
    permutation = KeyedPermutation(size, "key")
    indices = np.arange(start % size, min(start % size + 20, size))
    together = permutation(indices)
    assert [int(permutation([index])[0]) for index in indices] == together.tolist()
    assert len(set(together.tolist())) == len(indices)


def test_permutations_of_different_keys_are_unrelated() -> None:
    first, second = (KeyedPermutation(10_000, key)(np.arange(10_000)) for key in ("a", "b"))
    assert np.mean(first == second) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        KeyedPermutation(5, "key")([5])


@given(
    samples=st.integers(1, 300),
    batch=st.integers(1, 64),
    epochs=st.floats(0.05, 3.5),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once(samples: int, batch: int, epochs: float, seed: int) -> None:
    if round(epochs * samples) < 1:
        epochs = 1.0
    plan = TrainingPlan(samples, batch, epochs, seed, "digest")
    by_epoch: dict[int, list[int]] = {}
    for step in range(plan.steps_total):
        indices = plan.global_batch(step)
        assert 0 < len(indices) <= batch
        by_epoch.setdefault(plan.epoch_of(step), []).extend(indices)
    whole, rest = divmod(round(epochs * samples), samples)
    assert len(by_epoch) == whole + (rest > 0)
    for epoch in range(whole):
        assert sorted(by_epoch[epoch]) == list(range(samples))
    if rest:
        assert len(set(by_epoch[whole])) == len(by_epoch[whole]) == rest


def test_epochs_and_seeds_give_different_orders() -> None:
    plan = TrainingPlan(100, 100, 2, 0, "digest")
    orders = [
        plan.global_batch(0),
        plan.global_batch(1),
        TrainingPlan(100, 100, 1, 1, "digest").global_batch(0),
        TrainingPlan(100, 100, 1, 0, "other").global_batch(0),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError):
        TrainingPlan(0, 4, 1, 0, "digest")
    with pytest.raises(RecipeError):
        TrainingPlan(3, 4, 0.01, 0, "digest")


@given(
    lengths=st.lists(st.integers(1, 2048), min_size=1, max_size=128),
    world=st.integers(1, 8),
    micro=st.integers(1, 16),
)
@settings(max_examples=200, deadline=None)
def test_deal_gives_every_sample_to_one_rank_in_equal_micro_batch_counts(
    lengths: list[int], world: int, micro: int
) -> None:
    plan = TrainingPlan(len(lengths), len(lengths), 1, 0, "digest")
    count = plan.micro_batches(world, micro)
    for alike in (True, False):
        dealt = deal(lengths, world, micro, count, alike)
        assert [len(rank) for rank in dealt] == [count] * world
        assert all(len(batch) <= micro for rank in dealt for batch in rank)
        assert sorted(p for rank in dealt for batch in rank for p in batch) == list(range(len(lengths)))


def test_deal_balances_tokens_over_ranks() -> None:
    lengths = np.random.default_rng(0).integers(100, 2000, 128).tolist()
    dealt = deal(lengths, 8, 4, 4)
    tokens = [sum(lengths[p] for batch in rank for p in batch) for rank in dealt]
    assert max(tokens) - min(tokens) <= 0.02 * math.fsum(lengths) / 8


def test_without_padding_no_micro_batch_holds_all_the_long_samples() -> None:
    lengths = np.random.default_rng(0).integers(100, 2000, 128).tolist()
    largest = {
        alike: max(sum(lengths[p] for p in batch) for rank in deal(lengths, 8, 4, 4, alike) for batch in rank)
        for alike in (True, False)
    }
    assert largest[True] > 1.5 * math.fsum(lengths) / 32
    assert largest[False] < 1.1 * math.fsum(lengths) / 32


@given(lengths=st.lists(st.integers(1, 300), max_size=60), capacity=st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_packing_places_every_sample_once_in_rows_that_hold_it(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[position] for position in row) <= capacity or len(row) == 1
    filled = [sum(lengths[position] for position in row) for row in rows]
    # No two rows could have been one: a row is opened only while no other has room.
    assert sum(2 * used <= capacity for used in filled) <= 1
    assert pack(lengths, capacity) == rows


def test_a_sample_goes_where_it_leaves_the_least_room() -> None:
    assert pack([5, 3, 6, 4], 10) == [[2, 3], [0, 1]]
    assert pack([20, 2], 10) == [[0], [1]]


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "told"),
    [(8, 4, 2.0, [0.5, 1.0, 1.5, 2.0]), (10, 4, 0.5, [0.4, 0.5]), (5, 8, 1.4, [1.0, 1.4])],
)
def test_epochs_are_told_in_visits(samples: int, batch: int, epochs: float, told: list[float]) -> None:
    plan = TrainingPlan(samples, batch, epochs, 0, "digest")
    assert [plan.epochs_after(step) for step in range(plan.steps_total)] == pytest.approx(told)


def test_a_batch_that_is_larger_than_the_data_makes_no_empty_passes() -> None:
    assert TrainingPlan(30, 1024, 1, 0, "digest").micro_batches(world_size=2, micro=4) == 4
    assert TrainingPlan(3000, 1024, 1, 0, "digest").micro_batches(world_size=2, micro=4) == 128


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e17, 1e300])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(RecipeError, match="The weight of dataset 'a'"):
        Part("a", 5, weight)


def test_the_warm_up_ends_before_the_last_step() -> None:
    assert lr_factor(0, 1, 0.03, "cosine") == 1.0
    assert [lr_factor(step, 3, 1.0, "constant") for step in range(3)] == [0.0, 0.5, 1.0]
