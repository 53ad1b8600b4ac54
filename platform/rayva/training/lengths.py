"""Limits of length: which samples a stage leaves out before it starts, and whether the rest fits.

Every sample is encoded once for the limits, by all ranks together, and the lengths are kept with the
unfinished stage: a stage that goes on reads them.
"""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from rayva.errors import DataError, RecipeError
from rayva.model.positions import positions
from rayva.progress import Progress, say
from rayva.recipes.schema import Lengths
from rayva.storage import Storage
from rayva.training.dataset import SampleSource

_LOOKED_AT = 256


def require_answers(source: SampleSource, stage: str) -> None:
    """Looks at some samples, spread evenly over all, and warns where answers do not fit `max_tokens`.

    Raises:
        RecipeError: none keeps an answer, since `conversation.max_tokens` cuts them off.
        DataError: none has one for other reasons.
    """
    if not len(source):
        return  # the plan tells
    indices = np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT), dtype=np.int64).tolist()
    counts: Counter[str] = Counter()
    examples = [source.example(index, 0, counts) for index in indices]
    kept = sum(example is not None and example.supervised > 0 for example in examples)
    cut = counts["truncated"] + counts["dropped_over_length"]
    looked_at = f"of {len(indices):,} samples of {stage} that were looked at (of {len(source):,})"
    limit = f"conversation.max_tokens={source.max_tokens}, of which {source.image_tokens} go to each image"
    if not kept and cut:
        lengths = [tokens for tokens, _ in map(source.length, indices) if tokens >= 0]
        raise RecipeError(
            f"None {looked_at} keeps an answer to learn from within {limit}: they have {min(lengths):,} to "
            f"{max(lengths):,} tokens.",
            f"set conversation.max_tokens={max(lengths)}, or as much of it as the memory allows",
        )
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
        raise DataError(f"None {looked_at} has an answer to learn from: {reasons}.", "look at the data")
    if lost := counts["without_answer"] + counts["dropped_over_length"]:
        say(f"warning: {lost:,} {looked_at} keep no answer to learn from within {limit}")


def require_positions(config: PretrainedConfig, max_tokens: int) -> None:
    """Raises `RecipeError` where samples may be longer than the language model has positions."""
    limit = positions(config)
    if limit is not None and max_tokens > limit:
        raise RecipeError(
            f"conversation.max_tokens={max_tokens}, but the language model has {limit} positions "
            "(max_position_embeddings, with what its RoPE scaling adds).",
            f"set conversation.max_tokens={limit}, or choose a model with a longer context",
        )


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


def _kept(storage: Storage, rel: str, samples: int) -> npt.NDArray[np.int64] | None:
    """Lengths that an earlier start has measured; None where there are none, or none of use."""
    if not storage.exists(rel):
        return None
    try:
        kept: npt.NDArray[np.int64] = np.load(io.BytesIO(storage.read_bytes(rel)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        say(f"  {storage.uri(rel)} is damaged ({error}): the lengths are measured anew")
        return None
    return kept if kept.shape == (samples, 2) else None


def _lengths(
    source: SampleSource, storage: Storage, rel: str, device: torch.device, keep: bool
) -> npt.NDArray[np.int64]:
    """Tokens and supervised tokens of every sample [N, 2]; -1 where it cannot be encoded."""
    if (kept := _kept(storage, rel, len(source))) is not None:
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
