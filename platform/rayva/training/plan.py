"""The training plan: which samples make up which step, as a pure function of an integer.

The order of an epoch is a keyed permutation that is evaluated index by index, so it needs no memory
that grows with the data, and any step can be looked up without replaying those before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rayva.errors import DataError, RecipeError

_ROUNDS = 8
"""Feistel rounds; four already make a strong pseudo-random permutation of a strong round function."""

_MOST_VISITS = 100_000
"""Of a sample in one epoch: indices of visits stay far within 64 bits."""

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


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

    def __call__(self, indices: npt.ArrayLike) -> Int64:
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


@dataclass(frozen=True, slots=True)
class Part:
    """One dataset of a mix: `weight` is how often an epoch visits each of its samples, on average."""

    name: str
    samples: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(
                f"The dataset {self.name!r} has no sample to train on",
                "look at the data step's quarantine table and at the stage's length limits, or take it out",
            )
        if not 0 < self.weight <= _MOST_VISITS:
            raise RecipeError(
                f"The weight of dataset {self.name!r} is {self.weight}",
                f"give a number > 0 and at most {_MOST_VISITS:,}",
            )
        if self.visits < 1:
            raise RecipeError(
                f"{self.weight} of the {self.samples} samples of the dataset {self.name!r} is less than one",
                "raise its weight, or take it out",
            )

    @property
    def visits(self) -> int:
        """Visits in one epoch: weight x samples, rounded half to even."""
        return round(self.weight * self.samples)


@dataclass(frozen=True)
class TrainingPlan:
    """Steps, epochs and global batches of one stage; its whole state is the number of the next step.

    One dataset: every epoch visits every sample exactly once. A mix (`parts`, whose samples are numbered
    one part after the other): an epoch holds `Part.visits` visits of each part. They are numbered through
    all epochs: visit v is of pass v // samples, and every pass holds every sample once, so what a
    fractional weight leaves out of one epoch comes in the next. The order of an epoch's visits, all parts
    together, is a keyed permutation.

    An epoch's last batch is smaller where `batch_size` does not divide its visits. A fractional last epoch
    makes the first part of its visits. No batch spans two epochs. Raises `DataError` without samples and
    `RecipeError` when no step would be taken.
    """

    num_samples: int
    batch_size: int
    epochs: float
    seed: int
    dataset_digest: str
    parts: tuple[Part, ...] = ()
    """Without: one dataset of weight 1."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                "There is no sample to train on",
                "Look at the data step's quarantine table and at the stage's length limits.",
            )
        if self.parts and sum(part.samples for part in self.parts) != self.num_samples:
            raise ValueError(f"the parts do not add up to {self.num_samples} samples")
        if self.steps_total < 1:
            raise RecipeError(
                f"{self.epochs} epochs of {self.samples_per_epoch} samples hold no sample", "Raise `epochs`."
            )

    @classmethod
    def mixed(
        cls, parts: Sequence[Part], batch_size: int, epochs: float, seed: int, dataset_digest: str
    ) -> TrainingPlan:
        """A plan over several datasets."""
        samples = sum(part.samples for part in parts)
        return cls(samples, batch_size, epochs, seed, dataset_digest, tuple(parts))

    @property
    def samples_per_epoch(self) -> int:
        """Visits of one whole epoch."""
        return int(self._visit_ends[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one whole epoch."""
        return math.ceil(self.samples_per_epoch / self.batch_size)

    @property
    def samples_total(self) -> int:
        """Samples visited over all epochs, repetitions counted."""
        return round(self.epochs * self.samples_per_epoch)

    @property
    def steps_total(self) -> int:
        """Steps of the whole stage."""
        whole, rest = divmod(self.samples_total, self.samples_per_epoch)
        return whole * self.steps_per_epoch + math.ceil(rest / self.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def epochs_after(self, step: int) -> float:
        """Epochs that are done after a step, in visits of samples."""
        epoch, position = divmod(step, self.steps_per_epoch)
        within = min((position + 1) * self.batch_size, self.samples_per_epoch)
        visited = min(epoch * self.samples_per_epoch + within, self.samples_total)
        return visited / self.samples_per_epoch

    def global_batch(self, step: int) -> list[int]:
        """Sample indices of a step, in order; independent of world size and micro-batch size."""
        if not 0 <= step < self.steps_total:
            raise IndexError(f"step {step} is outside the plan's {self.steps_total} steps")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        left_in_epoch = min(self.samples_per_epoch, self.samples_total - epoch * self.samples_per_epoch)
        stop = min(start + self.batch_size, left_in_epoch)
        visits = self._permutation(epoch)(np.arange(start, stop))
        indices: list[int] = self._samples(epoch, visits).tolist()
        return indices

    def visited(self, indices: Sequence[int]) -> dict[str, int]:
        """How many of these sample indices are of each part, by its name; empty without a mix."""
        if not self.parts:
            return {}
        owners = np.searchsorted(self._sample_ends, np.asarray(indices, dtype=np.int64), side="right")
        counts = np.bincount(owners, minlength=len(self.parts))
        return {part.name: int(count) for part, count in zip(self.parts, counts, strict=True)}

    def micro_batches(self, world_size: int, micro: int) -> int:
        """Forward passes of each rank in every step: the same for all ranks and steps."""
        largest = min(self.batch_size, self.samples_per_epoch)
        return math.ceil(largest / (world_size * micro))

    def _samples(self, epoch: int, visits: Int64) -> Int64:
        """Sample indices of visits [n], each in range(samples_per_epoch)."""
        if not self.parts:
            return visits
        samples = np.empty_like(visits)
        owners = np.searchsorted(self._visit_ends, visits, side="right")
        for number, part in enumerate(self.parts):
            of_part = owners == number
            if not of_part.any():
                continue
            first = int(self._visit_ends[number]) - part.visits
            within = self._within(number, epoch * part.visits + visits[of_part] - first)
            samples[of_part] = int(self._sample_ends[number]) - part.samples + within
        return samples

    def _within(self, number: int, visits: Int64) -> Int64:
        """Samples of a part, each in range(part.samples), at visits [n] counted through all epochs."""
        part = self.parts[number]
        passes, positions = np.divmod(visits, part.samples)
        # Where epochs hold whole passes, the order inside a pass decides nothing: they are mixed anyway.
        if part.visits % part.samples:
            for current in np.unique(passes):
                own = passes == current
                key = f"{self.dataset_digest}/{self.seed}/{part.name}/{current}"
                positions[own] = KeyedPermutation(part.samples, key)(positions[own])
        return positions

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch not in self._permutations:
            self._permutations.clear()
            key = f"{self.dataset_digest}/{self.seed}/{epoch}"
            self._permutations[epoch] = KeyedPermutation(self.samples_per_epoch, key)
        return self._permutations[epoch]

    @cached_property
    def _permutations(self) -> dict[int, KeyedPermutation]:
        return {}

    @cached_property
    def _visit_ends(self) -> Int64:
        return np.cumsum([part.visits for part in self.parts] or [self.num_samples], dtype=np.int64)

    @cached_property
    def _sample_ends(self) -> Int64:
        return np.cumsum([part.samples for part in self.parts], dtype=np.int64)


def deal(
    lengths: Sequence[int], world_size: int, micro: int, micro_batches: int, alike: bool = True
) -> list[list[list[int]]]:
    """Deals a step's samples: result[rank][micro-batch] holds positions in `lengths`.

    Every rank gets `micro_batches` of at most `micro` samples each; some are empty when samples are few.
    Ranks are balanced by tokens. A pure function of its arguments.

    Args:
        alike: each micro-batch holds samples of like length, so that little is padding. Without,
            micro-batches are balanced by tokens too: where nothing is padded, the largest decides the memory.
    """
    capacity = micro * micro_batches
    if len(lengths) > world_size * capacity:
        raise ValueError(f"{len(lengths)} samples do not fit {world_size} ranks of {capacity}")
    ranks = _spread(range(len(lengths)), lengths, world_size, capacity)
    if not alike:
        return [_spread(own, lengths, micro_batches, micro) for own in ranks]
    return [[own[start * micro : (start + 1) * micro] for start in range(micro_batches)] for own in ranks]


def _spread(positions: Iterable[int], lengths: Sequence[int], groups: int, capacity: int) -> list[list[int]]:
    """Longest first, each to the group that has room and the fewest tokens so far."""
    spread: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    for position in sorted(positions, key=lambda position: (-lengths[position], position)):
        with_room = (group for group in range(groups) if len(spread[group]) < capacity)
        group = min(with_room, key=lambda g: (tokens[g], len(spread[g]), g))
        spread[group].append(position)
        tokens[group] += lengths[position]
    return spread


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
