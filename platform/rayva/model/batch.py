"""Batches: expanded token rows, their labels and the visual features that belong into them.

Shapes: B rows, T positions, N features of one image, M features of the whole batch, D vision hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayva.errors import DataError
from rayva.text.special import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class ImageCountError(DataError):
    """The number of image places differs from the number of visual features given."""

    def __init__(self, where: str, places: int, given: int) -> None:
        super().__init__(
            f"{where} has {places} image positions but {given} visual features",
            "Every image needs its features, and each as many positions as the vision tower has tokens.",
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One sample, expanded: every image holds as many places as it has features.

    `input_ids` and `labels` have equal length; `features_MD` holds one row for each place in
    `input_ids` that is `IMAGE_TOKEN_INDEX`, in order; it is None where there is no such place.
    Raises `ImageCountError` when places and features differ in number: splicing them anyway would
    silently pair text with the wrong pixels.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    features_MD: Tensor | None

    def __post_init__(self) -> None:
        places = sum(token == IMAGE_TOKEN_INDEX for token in self.input_ids)
        given = 0 if self.features_MD is None else self.features_MD.shape[0]
        if places != given:
            raise ImageCountError("A row", places, given)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model takes.

    `attention_mask_BT` is None for rows that are padded on the right: under causal attention no real
    position ever sees the padding after it. Rows padded on the left need the mask.
    `position_ids_BT` is set where a row holds several samples. It starts anew with each of them, and
    transformers keeps attention within each such run with a block mask.
    `sample_lengths` is set where all samples stand one behind the other in one row, without padding: the
    length of each. That takes a model which `rayva.model.attention.isolate_samples` has prepared.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    features_MD: Tensor
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    sample_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        mask, positions = self.attention_mask_BT, self.position_ids_BT
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            features_MD=self.features_MD.to(device, non_blocking=True),
            attention_mask_BT=None if mask is None else mask.to(device, non_blocking=True),
            position_ids_BT=None if positions is None else positions.to(device, non_blocking=True),
        )


def expand_images(
    input_ids: Sequence[int], labels: Sequence[int] | None, tokens_per_image: int
) -> tuple[list[int], list[int]]:
    """Repeats every image place `tokens_per_image` times; labels there, or without `labels`, are ignored."""
    ids: list[int] = []
    expanded: list[int] = []
    for position, token in enumerate(input_ids):
        repeat = tokens_per_image if token == IMAGE_TOKEN_INDEX else 1
        ids.extend([token] * repeat)
        ignored = labels is None or token == IMAGE_TOKEN_INDEX
        expanded.extend([IGNORE_INDEX if ignored or labels is None else labels[position]] * repeat)
    return ids, expanded


def collate(rows: Sequence[Row], vision_hidden: int, *, left: bool = False) -> Batch:
    """Pads rows to a common length: on the right for training, on the left (with a mask) for generation.

    Without rows, one ignored position is returned, so that a rank without work still takes part in
    every collective of the step, with a loss of zero.
    """
    if not rows:
        rows = [Row([0], [IGNORE_INDEX], None)]
    length = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BT = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        span = slice(length - size, length) if left else slice(0, size)
        input_ids_BT[index, span] = torch.as_tensor(row.input_ids, dtype=torch.long)
        labels_BT[index, span] = torch.as_tensor(row.labels, dtype=torch.long)
        mask_BT[index, span] = 1
    features = [row.features_MD for row in rows if row.features_MD is not None]
    features_MD = torch.cat(features) if features else torch.zeros(0, vision_hidden)
    return Batch(input_ids_BT, labels_BT, features_MD, mask_BT if left else None)


def collate_packed(packed: Sequence[Sequence[Row]], vision_hidden: int) -> Batch:
    """Rows of several samples each, padded on the right; no sample sees another one.

    The first label of a sample is ignored: what stands before it in the row belongs to another one.
    """
    batch = collate([_joined(samples) for samples in packed], vision_hidden)
    if all(len(samples) <= 1 for samples in packed):
        return batch
    length = batch.input_ids_BT.shape[1]
    return replace(batch, position_ids_BT=torch.stack([_positions(samples, length) for samples in packed]))


def collate_flat(rows: Sequence[Row], vision_hidden: int) -> Batch:
    """All samples one behind the other in one row, without padding (`Batch.sample_lengths`)."""
    rows = rows or [Row([0], [IGNORE_INDEX], None)]
    batch = collate([_joined(rows)], vision_hidden)
    lengths = tuple(len(row.input_ids) for row in rows)
    positions_BT = _positions(rows, sum(lengths)).unsqueeze(0)
    return replace(batch, position_ids_BT=positions_BT, sample_lengths=lengths)


def _joined(samples: Sequence[Row]) -> Row:
    ids = [token for row in samples for token in row.input_ids]
    labels = [label for row in samples for label in (IGNORE_INDEX, *row.labels[1:])]
    features = [row.features_MD for row in samples if row.features_MD is not None]
    return Row(ids, labels, torch.cat(features) if features else None)


def _positions(samples: Sequence[Row], length: int) -> Tensor:
    """Position ids [T]; padding counts on from the last sample, behind which nothing looks at it."""
    sizes = [len(row.input_ids) for row in samples]
    sizes[-1] += length - sum(sizes)
    return torch.cat([torch.arange(size) for size in sizes])
