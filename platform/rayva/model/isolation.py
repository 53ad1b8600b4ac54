"""How a language model takes several samples in one row, found out by trying.

Whether a sample sees another one depends on what a model's layers do with borders, position ids and masks:
convolutions and recurrent layers carry on over a border, some layers do not hand borders through. No list of
models would stay right, so a short pair of samples is run through each layout and compared with them alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.attention import isolate_samples
from rayva.model.batch import Batch, Row, collate, collate_flat, collate_packed
from rayva.model.last_mlp import last_mlp
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IGNORE_INDEX

logger = logging.getLogger(__name__)

Layout = Literal["flat", "rows", "padded"]
"""How a micro-batch's samples lie: one behind the other in one row without padding; packed into rows, with
a block mask; or a row for each."""

_LENGTHS = (13, 9)
_TOLERANCE = 1e-4
"""Of the hidden states' norm in fp32: rounding is far below, another sample's influence far above."""


def agree_on_batches(model: VisionLanguageModel, packing: bool, narrow: bool) -> Layout:
    """`find_layout` and, to `narrow`, `narrow_last_mlp`, both tried by rank 0; every rank calls it.

    Trials take memory for the weights in fp32.
    """
    told: list[tuple[Layout, bool] | WeightsError | None] = [None]
    if dist.get_rank() == 0:
        told = [_tried(model, packing, narrow)]
    dist.broadcast_object_list(told, src=0)
    (found,) = told
    if isinstance(found, WeightsError):
        raise found
    assert found is not None
    layout, narrowed = found
    if dist.get_rank() != 0:
        if layout == "flat":
            isolate_samples(model.language)
        if narrowed:
            model.last_mlp = last_mlp(model.language)
    return layout


def _tried(model: VisionLanguageModel, packing: bool, narrow: bool) -> tuple[Layout, bool] | WeightsError:
    """The layout and whether the last MLP was narrowed, or the error: the other ranks wait for either."""
    try:
        with _in_float32(model):  # once, for the trials within
            return find_layout(model, packing), narrow and model.last_mlp is None and narrow_last_mlp(model)
    except WeightsError as error:
        return error


def find_layout(model: VisionLanguageModel, packing: bool) -> Layout:
    """The layout with the least padding in which no sample sees another one; without `packing`, `padded`.

    The model must be whole, on one device. It is left ready for that layout (`isolate_samples`).

    Raises:
        WeightsError: even samples in rows of their own do not give what each gives alone.
    """
    plain = model.language.config._attn_implementation
    if packing and isolate_samples(model.language):
        if _isolates(model, "flat"):
            return "flat"
        model.language.set_attn_implementation(plain)
    if packing and _isolates(model, "rows"):
        return "rows"
    if not _isolates(model, "padded"):
        raise WeightsError(
            f"The language model ({model.language.config.model_type}) gives a sample other hidden states "
            "with padding behind it than without",
            "Choose a causal language model, such as one of the Llama family.",
        )
    if packing:
        logger.warning(
            "samples of a %s model see each other in one row: each has a row, as with packing=false",
            model.language.config.model_type,
        )
    return "padded"


@torch.no_grad()
def narrow_last_mlp(model: VisionLanguageModel) -> bool:
    """Has the loss compute the last layer's MLP where there are labels alone, if that changes nothing there.

    Returns whether. The model must be whole, on one device.
    """
    narrowed = last_mlp(model.language)
    if narrowed is None:
        return False
    batch = collate(_samples(model), model.vision_hidden)
    positions_S = torch.arange(1, batch.input_ids_BT.numel(), 3)
    with _evaluating(model), _in_float32(model):
        expected_MH = model.forward_hidden(batch).flatten(0, 1)
        if narrowed.is_plain:
            with narrowed.at(positions_S):
                found_MH = model.forward_hidden(batch).flatten(0, 1)
            if _alike(found_MH[positions_S], expected_MH[positions_S]):
                model.last_mlp = narrowed
                return True
    narrowed.remove()
    return False


@torch.no_grad()
def _isolates(model: VisionLanguageModel, layout: Layout) -> bool:
    """Whether each of two samples has the hidden states that it has alone."""
    rows = _samples(model)
    with _evaluating(model), _in_float32(model):
        alone = [model.forward_hidden(collate([row], model.vision_hidden))[0] for row in rows]
        together_BTH = model.forward_hidden(_together(rows, layout, model.vision_hidden))
    first, second = _LENGTHS
    if layout == "padded":
        found = [together_BTH[0, :first], together_BTH[1, :second]]
    else:
        found = [together_BTH[0, :first], together_BTH[0, first : first + second]]
    return all(_alike(*pair) for pair in zip(found, alone, strict=True))


def _alike(found_TH: Tensor, expected_TH: Tensor) -> bool:
    return bool((found_TH - expected_TH).norm() <= _TOLERANCE * expected_TH.norm())


def _samples(model: VisionLanguageModel) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.language.get_input_embeddings().weight.shape[0]
    drawn = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]
    return [Row(ids, [IGNORE_INDEX] * len(ids), None) for ids in drawn]


def _together(rows: list[Row], layout: Layout, vision_hidden: int) -> Batch:
    if layout == "flat":
        return collate_flat(rows, vision_hidden)
    return collate_packed([rows], vision_hidden) if layout == "rows" else collate(rows, vision_hidden)


@contextmanager
def _evaluating(model: VisionLanguageModel) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _in_float32(model: VisionLanguageModel) -> Iterator[None]:
    """In bf16, rounding alone may send a token to other experts: no tolerance tells that from a leak."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        # What came from bf16 goes back to the very same bits.
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
