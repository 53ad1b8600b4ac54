"""Samples as the model takes them: a table of conversations, and the visual features of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayva.data.schema import Turn
from rayva.errors import DataError
from rayva.model.batch import Row, expand_images
from rayva.text.conversation import BadConversation, messages_from_turns, place_image, sample_rng
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_sample
from rayva.text.templates import Template


class FeatureReader(Protocol):
    """Where visual features come from: the store, or a tower that encodes on the spot."""

    num_tokens: int
    """N: features of one image."""
    encodes: bool
    """Whether reading is computing, with torch's threads, and not only waiting for a storage."""

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        """Features [N, D] of each image."""
        ...


class StoredFeatures:
    """Features of the store, found by the image's content key and read by several threads."""

    encodes = False

    def __init__(
        self,
        read: Callable[[str], npt.NDArray[np.float16]],
        keys: Mapping[str, str],
        num_tokens: int,
        threads: int = 16,
    ) -> None:
        self._read, self._keys, self.num_tokens = read, keys, num_tokens
        self._pool = ThreadPoolExecutor(threads, "features", initializer=leave_cores_to_training)

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        """Features [N, D] of each image, in fp16; one that several samples share is read once."""
        distinct = list(dict.fromkeys(self._keys[image_id] for image_id in image_ids))
        features = dict(zip(distinct, self._pool.map(self._copy, distinct), strict=True))
        return [features[self._keys[image_id]] for image_id in image_ids]

    def _copy(self, key: str) -> Tensor:
        return torch.tensor(self._read(key))


def leave_cores_to_training() -> None:
    """In a thread that reads: torch copies in this thread alone.

    OpenMP lets the training thread's helpers spin between operations only while there are no more threads in
    teams than cores; a second team makes them sleep, and every operation of the model wakes them up again.
    """
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How conversations become token sequences."""

    template: Template
    image_position: Literal["data", "front", "random"] = "data"
    max_tokens: int = 2048
    over_length: Literal["truncate", "drop"] = "truncate"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded sample, images expanded; its features are read only by the rank that trains on it."""

    sample_id: str
    image_ids: tuple[str, ...]
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Positions that the loss counts: the first one has nothing before it to be predicted from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class SampleSource:
    """A stage's samples by index; those with an image that has no features are left out and counted.

    `samples` is a table of `rayva.data.schema.SAMPLES`, where a dataset's samples lie together;
    `image_ids` are those that have features.
    """

    def __init__(
        self,
        samples: pa.Table,
        image_ids: pa.Array,
        features: FeatureReader,
        text: TextSettings,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        usable = _rows_with_known_images(samples, image_ids)
        self.left_out = Counter(image_quarantined=samples.num_rows - len(usable))
        self._samples, self._rows = samples, usable
        self._features, self._text, self._tokenizer = features, text, tokenizer

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def encodes(self) -> bool:
        """Whether reading features is computing them."""
        return self._features.encodes

    @property
    def max_tokens(self) -> int:
        """What no example is longer than."""
        return self._text.max_tokens

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return self._features.num_tokens

    def sizes(self) -> dict[str, int]:
        """Samples by dataset, in the order in which they lie; a table without datasets has one called ""."""
        names = self._samples["dataset"] if "dataset" in self._samples.column_names else None
        if names is None or not len(self):
            return {"": len(self)}
        coded = pc.fill_null(names.combine_chunks().take(pa.array(self._rows)), "").dictionary_encode()
        codes = np.asarray(coded.indices)
        if (np.diff(codes) < 0).any():
            raise ValueError("the samples of a dataset do not lie together")
        return dict(zip(coded.dictionary.to_pylist(), np.bincount(codes).tolist(), strict=True))

    def leave_out(self, mask: npt.NDArray[np.bool_], reason: str) -> None:
        """Removes the samples that `mask` [len(self)] marks, and counts them under `reason`."""
        self._rows = self._rows[~mask]
        self.left_out[reason] += int(mask.sum())

    def length(self, index: int) -> tuple[int, int]:
        """Tokens of a sample and supervised ones, before truncation; (-1, -1) where it cannot be encoded."""
        try:
            _, _, ids, labels = self._encode(index, 0)
        except BadConversation:
            return -1, -1
        return len(ids), sum(label != IGNORE_INDEX for label in labels)

    def example(self, index: int, epoch: int, counts: Counter[str]) -> Example | None:
        """Encodes a sample; None where it cannot be used. That, a truncation, and an answer that is cut off
        as a whole (nothing is left to learn from) are added to `counts`.

        Random choices depend on (seed, epoch, index) alone.
        """
        try:
            sample_id, image_ids, ids, labels = self._encode(index, epoch)
        except BadConversation as error:
            counts[f"dropped_{error.reason}"] += 1
            return None
        if len(ids) > self._text.max_tokens:
            if self._text.over_length == "drop":
                counts["dropped_over_length"] += 1
                return None
            counts["truncated"] += 1
            ids, labels = ids[: self._text.max_tokens], labels[: self._text.max_tokens]
        example = Example(sample_id, image_ids, ids, labels)
        if not example.supervised:
            counts["without_answer"] += 1
        return example

    def sample_id(self, index: int) -> str:
        """The id of a sample."""
        return str(self._samples["sample_id"][int(self._rows[index])].as_py())

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """Examples with their features; a truncated image keeps the features that still have a place."""
        places = [sum(token == IMAGE_TOKEN_INDEX for token in example.input_ids) for example in examples]
        images = [-(-count // self._features.num_tokens) for count in places]
        wanted = [example.image_ids[:count] for example, count in zip(examples, images, strict=True)]
        features = iter(self._features.read([image_id for ids in wanted for image_id in ids]))
        rows = []
        for example, ids, count in zip(examples, wanted, places, strict=True):
            own = [next(features) for _ in ids]
            rows.append(Row(example.input_ids, example.labels, torch.cat(own)[:count] if own else None))
        return rows

    def _encode(self, index: int, epoch: int) -> tuple[str, tuple[str, ...], list[int], list[int]]:
        """Id, image ids, token ids and labels, images expanded and nothing truncated."""
        row = self._samples.slice(int(self._rows[index]), 1).to_pylist()[0]
        image_ids = tuple(row["image_ids"])
        turns = [Turn(turn["role"], turn["text"]) for turn in row["turns"]]
        messages = messages_from_turns(turns, len(image_ids))
        rng = sample_rng(self._text.seed, epoch, index)
        messages = place_image(messages, self._text.image_position, rng)
        encoded = encode_sample(messages, self._text.template, self._tokenizer)
        ids, labels = expand_images(encoded.input_ids, encoded.labels, self._features.num_tokens)
        return row["sample_id"], image_ids, ids, labels


def _rows_with_known_images(samples: pa.Table, image_ids: pa.Array) -> npt.NDArray[np.int64]:
    """Indices of the rows all of whose images are among `image_ids`; text-only rows are."""
    if not samples.num_rows:
        raise DataError("The table of samples is empty", "Look at the quarantine table of the data step.")
    lists = pa.concat_arrays(samples["image_ids"].chunks)
    unknown = np.asarray(pc.invert(pc.is_in(lists.flatten(), value_set=image_ids)), dtype=np.int64)
    lengths = np.asarray(pc.list_value_length(lists), dtype=np.int64)
    ends = np.cumsum(lengths)
    running = np.concatenate([[0], np.cumsum(unknown)])
    return np.flatnonzero(running[ends] == running[ends - lengths])
