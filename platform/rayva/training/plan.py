"""The training plan: which samples make up which step, as a pure function of an integer.

The order of an epoch is a keyed permutation that is evaluated index by index, so it needs no memory
that grows with the data, and any step can be looked up without replaying those before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rayva.errors import DataError, RecipeError

_ROUNDS = 8
"""Feistel rounds; four already make a strong pseudo-random permutation of a strong round function."""

UInt64 = npt.NDArray[np.uint64]


class KeyedPermutation:
    """A pseudo-random permutation of range(size), evaluated per index in constant memory.

    A Feistel network permutes the smallest even power of two that holds `size`; an index that lands
    outside is sent through again ("cycle walking") until it lands inside, on average under four times.
    """

    def __init__(self, size: int, key: str) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The images of `indices` [n], each in range(size)."""
        values = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise IndexError(f"indices must lie in [0, {self.size})")
        out = self._encrypt(values.astype(np.uint64))
        outside = out >= self.size
        while outside.any():
            out[outside] = self._encrypt(out[outside])
            outside = out >= self.size
        return out.astype(np.int64)

    def _encrypt(self, values: UInt64) -> UInt64:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: UInt64) -> UInt64:
    """The finaliser of SplitMix64: every input bit changes every output bit with probability near 1/2."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class TrainingPlan:
    """Steps, epochs and global batches of one stage; its whole state is the number of the next step.

    Every epoch visits every sample exactly once; its last batch is smaller where `batch_size` does not
    divide `num_samples`. A fractional last epoch visits the first part of its permutation. No batch
    spans two epochs. Raises `DataError` without samples and `RecipeError` when no step would be taken.
    """

    num_samples: int
    batch_size: int
    epochs: float
    seed: int
    dataset_digest: str

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("There is no sample to train on", "Look at the data step's quarantine table.")
        if self.steps_total < 1:
            raise RecipeError(
                f"{self.epochs} epochs of {self.num_samples} samples hold no sample", "Raise `epochs`."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one whole epoch."""
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def samples_total(self) -> int:
        """Samples visited over all epochs, repetitions counted."""
        return round(self.epochs * self.num_samples)

    @property
    def steps_total(self) -> int:
        """Steps of the whole stage."""
        whole, rest = divmod(self.samples_total, self.num_samples)
        return whole * self.steps_per_epoch + math.ceil(rest / self.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> list[int]:
        """Sample indices of a step, in order; independent of world size and micro-batch size."""
        if not 0 <= step < self.steps_total:
            raise IndexError(f"step {step} is outside the plan's {self.steps_total} steps")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        left_in_epoch = min(self.num_samples, self.samples_total - epoch * self.num_samples)
        stop = min(start + self.batch_size, left_in_epoch)
        indices: list[int] = self._permutation(epoch)(np.arange(start, stop)).tolist()
        return indices

    def micro_batches(self, world_size: int, micro: int) -> int:
        """Forward passes of each rank in every step: the same for all ranks and steps."""
        return math.ceil(self.batch_size / (world_size * micro))

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch not in self._permutations:
            self._permutations.clear()
            key = f"{self.dataset_digest}/{self.seed}/{epoch}"
            self._permutations[epoch] = KeyedPermutation(self.num_samples, key)
        return self._permutations[epoch]

    @cached_property
    def _permutations(self) -> dict[int, KeyedPermutation]:
        return {}


def deal(lengths: Sequence[int], world_size: int, micro: int, micro_batches: int) -> list[list[list[int]]]:
    """Deals a step's samples: result[rank][micro-batch] holds positions in `lengths`.

    Every rank gets `micro_batches` of at most `micro` samples each; some are empty when samples are
    few. Ranks are balanced by tokens (longest first, to the rank with the fewest so far), and each
    micro-batch holds samples of like length, so that little is padding. A pure function of its arguments.
    """
    capacity = micro * micro_batches
    if len(lengths) > world_size * capacity:
        raise ValueError(f"{len(lengths)} samples do not fit {world_size} ranks of {capacity}")
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for position in order:
        open_ranks = (rank for rank in range(world_size) if len(ranks[rank]) < capacity)
        rank = min(open_ranks, key=lambda r: (tokens[r], len(ranks[r]), r))
        ranks[rank].append(position)
        tokens[rank] += lengths[position]
    return [[own[start * micro : (start + 1) * micro] for start in range(micro_batches)] for own in ranks]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs samples into rows of at most `capacity` tokens; each row holds positions in `lengths`.

    Best fit, longest first: each goes into the fullest row that still has room. A sample that is longer
    than `capacity` has a row of its own. A pure function of its arguments.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        length = lengths[position]
        fitting = [row for row in range(len(rows)) if room[row] >= length]
        if fitting:
            row = min(fitting, key=lambda row: (room[row], row))
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(position)
        room[row] -= length
    return rows
