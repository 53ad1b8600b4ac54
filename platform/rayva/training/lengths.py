"""Limits of length: which samples a stage leaves out before it starts.

Every sample is encoded once for it, by all ranks together, and the lengths are kept with the unfinished
stage: a stage that goes on reads them.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from rayva.errors import DataError
from rayva.progress import Progress, say
from rayva.recipes.schema import Lengths
from rayva.storage import Storage
from rayva.training.dataset import SampleSource


def apply_limits(
    source: SampleSource,
    limits: Lengths,
    storage: Storage,
    rel: str,
    device: torch.device,
    keep: bool = True,
) -> None:
    """Leaves out of `source` what is shorter or longer than `limits`, counted by reason.

    The lengths are read from `rel` of the storage if they are there, else kept there if `keep`. A sample
    that cannot be encoded at all stays: it is dropped and counted where it is met. Raises `DataError` where
    nothing is left.
    """
    checks = _checks(limits)
    if not checks:
        return
    lengths_N2 = _lengths(source, storage, rel, device, keep)
    before = len(source)
    for column, wrong, bound, reason in checks:
        values_N = lengths_N2[:, column]
        mask = (values_N >= 0) & ((values_N < bound) if wrong == "below" else (values_N > bound))
        source.leave_out(mask, reason)
        lengths_N2 = lengths_N2[~mask]
    told = ", ".join(f"{source.left_out[reason]:,} {reason}" for *_, reason in checks)
    say(f"  limits of length leave out {before - len(source):,} of {before:,} samples: {told}")
    if not len(source):
        raise DataError(
            f"The stage's limits of length leave no sample ({told}).", "widen `lengths` of the stage"
        )


def _checks(limits: Lengths) -> list[tuple[int, str, int, str]]:
    """(column, which side is wrong, bound, reason) of each limit that is set."""
    every = (
        (0, "below", limits.min_tokens, "too_short"),
        (0, "above", limits.max_tokens, "too_long"),
        (1, "below", limits.min_answer_tokens, "answer_too_short"),
        (1, "above", limits.max_answer_tokens, "answer_too_long"),
    )
    return [(column, wrong, bound, reason) for column, wrong, bound, reason in every if bound is not None]


def _lengths(
    source: SampleSource, storage: Storage, rel: str, device: torch.device, keep: bool
) -> npt.NDArray[np.int64]:
    """Tokens and supervised tokens of every sample [N, 2]; -1 where it cannot be encoded."""
    if storage.exists(rel):
        kept: npt.NDArray[np.int64] = np.load(io.BytesIO(storage.read_bytes(rel)), allow_pickle=False)
        return kept
    together = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    lengths_N2 = np.zeros((len(source), 2), dtype=np.int64)
    progress = Progress("lengths", len(range(rank, len(source), ranks)), "samples")
    for index in range(rank, len(source), ranks):
        lengths_N2[index] = source.length(index)
        progress.advance()
    progress.close()
    if together and ranks > 1:
        # Where a rank did not look it has zeros.
        summed = torch.from_numpy(lengths_N2).to(device)
        dist.all_reduce(summed)
        lengths_N2 = summed.cpu().numpy()
    if rank == 0 and keep:
        # Only after all ranks have met: none of them finds the file and stays away.
        kept_as = io.BytesIO()
        np.save(kept_as, lengths_N2, allow_pickle=False)
        storage.write_bytes(rel, kept_as.getvalue())
    return lengths_N2
