"""Prepares the steps to come in a background thread: the plan's future is known."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from rayva.model.batch import Batch, Row, collate, collate_flat, collate_packed
from rayva.model.isolation import Layout
from rayva.text.special import IMAGE_TOKEN_INDEX
from rayva.training.dataset import Example, SampleSource, leave_cores_to_training
from rayva.training.plan import TrainingPlan, deal, pack

_ROW_SAMPLES = 2
"""A row has room for that many samples of a micro-batch's greatest length."""

VISITED = "visited/"
"""In counters and metrics: visits of each dataset of a mix, by its name."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One optimizer step: this rank's micro-batches, and figures of the global batch."""

    step: int
    micro_batches: list[Batch]
    sample_ids: list[str]
    lengths: list[int]
    """Tokens of each sample of the global batch."""
    image_tokens: int
    tokens: int
    padded_tokens: int
    supervised: int
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far reading runs ahead: so many steps, and fewer where they would hold more than `mebibytes`."""

    steps: int = 2
    mebibytes: int = 4096

    def room(self, pending: int, step_bytes: int | None) -> bool:
        """Whether one more step may be read beside `pending` ones; one always may.

        `step_bytes` is what the largest step has taken so far; None before there was one.
        """
        fits = step_bytes is not None and (pending + 1) * step_bytes <= self.mebibytes * 2**20
        return pending < self.steps and (fits or pending == 0)


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of every global batch is this rank's."""

    rank: int
    world_size: int
    micro: int
    layout: Layout = "padded"


def prepare_step(
    step: int, plan: TrainingPlan, source: SampleSource, share: Share, vision_hidden: int
) -> PreparedStep:
    """Encodes a global batch and reads the features of this rank's part.

    Every rank encodes the text of the whole batch: that takes a fraction of a step, and tells each
    of them the global token counts and the dealing without a message.
    """
    counts: Counter[str] = Counter()
    epoch = plan.epoch_of(step)
    indices = plan.global_batch(step)
    encoded = [source.example(index, epoch, counts) for index in indices]
    examples = [example for example in encoded if example is not None]
    lengths = [len(example.input_ids) for example in examples]
    micro_batches = plan.micro_batches(share.world_size, share.micro)
    dealt = deal(lengths, share.world_size, share.micro, micro_batches, alike=share.layout != "flat")
    packed = [[_rows(batch, lengths, source.max_tokens, share.layout) for batch in rank] for rank in dealt]
    padded = sum(_cells(rows, lengths) for rank in packed for rows in rank)
    own = [[[examples[i] for i in row] for row in rows] for rows in packed[share.rank]]
    # All images of this rank's part at once: they are read by several threads.
    rows = iter(source.rows([example for batch in own for row in batch for example in row]))
    supervised = sum(example.supervised for example in examples)
    counts.update(samples=len(examples), supervised_tokens=supervised, tokens=sum(lengths))
    counts.update({f"{VISITED}{name}": visits for name, visits in plan.visited(indices).items()})
    return PreparedStep(
        step=step,
        micro_batches=[_batch(part, rows, vision_hidden, share.layout) for part in own],
        sample_ids=[example.sample_id for example in examples],
        lengths=lengths,
        image_tokens=sum(example.input_ids.count(IMAGE_TOKEN_INDEX) for example in examples),
        tokens=sum(lengths),
        padded_tokens=padded,
        supervised=supervised,
        counts=counts,
    )


def _rows(batch: list[int], lengths: list[int], max_tokens: int, layout: Layout) -> list[list[int]]:
    """A micro-batch's samples by rows; positions in `lengths`."""
    if layout == "flat":
        return [batch] if batch else []
    if layout == "padded":
        return [[position] for position in batch]
    # Rows are no longer than it takes to leave little padding: attention with a mask costs their square.
    own = [lengths[position] for position in batch]
    capacity = min(max_tokens, _ROW_SAMPLES * max(own, default=0))
    return [[batch[i] for i in row] for row in pack(own, capacity)]


def _cells(rows: list[list[int]], lengths: list[int]) -> int:
    """Positions of a micro-batch with its padding."""
    return len(rows) * max((sum(lengths[position] for position in row) for row in rows), default=0)


def _batch(parts: list[list[Example]], rows: Iterator[Row], vision_hidden: int, layout: Layout) -> Batch:
    """A micro-batch of the next `rows`, one for each example of `parts`."""
    own = [[next(rows) for _ in examples] for examples in parts]
    if layout == "rows":
        return collate_packed(own, vision_hidden)
    samples = [row for part in own for row in part]
    return collate_flat(samples, vision_hidden) if layout == "flat" else collate(samples, vision_hidden)


def _bytes(prepared: PreparedStep) -> int:
    """What a step's features take."""
    return sum(batch.features_MD.nbytes for batch in prepared.micro_batches)


_AHEAD = Ahead()


@contextmanager
def prefetch(
    first_step: int,
    plan: TrainingPlan,
    source: SampleSource,
    share: Share,
    vision_hidden: int,
    ahead: Ahead = _AHEAD,
) -> Iterator[Iterator[tuple[PreparedStep, float]]]:
    """Yields an iterator over (step, seconds waited for it); an error in the thread is raised at its step."""
    executor = ThreadPoolExecutor(
        1, "prefetch", initializer=None if source.encodes else leave_cores_to_training
    )
    pending: deque[Future[PreparedStep]] = deque()

    left = iter(range(first_step, plan.steps_total))

    def ask(step_bytes: int | None) -> None:
        while ahead.room(len(pending), step_bytes) and (step := next(left, None)) is not None:
            pending.append(executor.submit(prepare_step, step, plan, source, share, vision_hidden))

    def steps() -> Iterator[tuple[PreparedStep, float]]:
        step_bytes = 0
        ask(None)
        while pending:
            started = time.monotonic()
            prepared = pending.popleft().result()
            waited = time.monotonic() - started
            step_bytes = max(step_bytes, _bytes(prepared))
            ask(step_bytes)  # before this one is worked on
            yield prepared, waited

    try:
        yield steps()
    finally:
        executor.shutdown(cancel_futures=True)
