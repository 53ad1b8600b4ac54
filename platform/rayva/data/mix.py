"""Several datasets as one: the samples of each stage lie together by dataset and carry its name."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from rayva.data import captions
from rayva.data.bundle import DatasetBundle, Lazy
from rayva.data.llava_json import (
    LlavaFile,
    distinct,
    held_out_questions,
    location,
)
from rayva.data.locations import absolute, parent
from rayva.data.schema import ImageRecord, Question, Rejected, Sample
from rayva.data.splits import UniqueIds
from rayva.errors import DataError
from rayva.recipes.schema import STAGES, Data, Dataset, StageName


def build(data: Data, brief: Sequence[str], detailed: Sequence[str]) -> DatasetBundle:
    """The tables of a recipe with `pretrain_mix` or `finetune_mix`.

    Ids of samples and questions are `DATASET/ID`. Images of one folder keep one id in all datasets and both
    stages, `DATASET://NAME` after the first of them; what is held out follows from the name alone, so a
    picture that two datasets share is on the same side. With `data.held_out_json` the pictures of that file
    are held out instead, and its rows are the questions.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    rejects: list[Rejected] = []
    noted: Counter[str] = Counter()
    prefixes = _Prefixes()
    held_out = None
    if data.held_out_json:
        root = absolute(location(data, "held_out")[1])
        held_out = held_out_questions(data, prefixes.of(root, "held_out"))
    sources: dict[StageName, list[_Source]] = {
        stage: [
            _source(data, dataset, stage, number, prefixes, held_out, brief, detailed)
            for number, dataset in enumerate(data.datasets(stage))
        ]
        for stage in STAGES
    }

    def every(stage: StageName, take: Callable[[_Source], Iterable[Sample]]) -> Lazy[Sample]:
        return Lazy(lambda: chain.from_iterable(take(source) for source in sources[stage]))

    asked: list[_Source] = [held_out] if held_out else sources["finetune"]
    # Rows of the stage-2 files are told of when they are read as samples.
    asked_sinks = (rejects, noted) if held_out else ([], Counter())
    every_source = [*sources["finetune"], *sources["pretrain"], *(asked if held_out else [])]
    return DatasetBundle(
        images=Lazy(lambda: distinct(chain.from_iterable(source.images() for source in every_source))),
        pretrain=every("pretrain", lambda source: source.samples(rejects, noted)),
        finetune=every("finetune", lambda source: source.samples(rejects, noted)),
        questions=Lazy(lambda: chain.from_iterable(source.questions(*asked_sinks) for source in asked)),
        rejected=rejects,
        noted=noted,
    )


class _Source(Protocol):
    """One dataset in one stage."""

    def samples(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Sample]: ...

    def images(self) -> Iterator[ImageRecord]: ...

    def questions(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Question]: ...


class _Prefixes:
    """What stands before image names, one for each folder: two folders may use one name for two pictures."""

    def __init__(self) -> None:
        self._by_root: dict[str, str] = {}
        self._names = UniqueIds()

    def of(self, root: str, label: str) -> str:
        if root not in self._by_root:
            self._by_root[root] = self._names.claim(label)
        return f"{self._by_root[root]}://"


def _source(
    data: Data,
    dataset: Dataset,
    stage: StageName,
    number: int,
    prefixes: _Prefixes,
    held_out: LlavaFile | None,
    brief: Sequence[str],
    detailed: Sequence[str],
) -> _Source:
    label = dataset.label
    if dataset.format == "llava":
        root = dataset.images or parent(dataset.path)
        prefix = prefixes.of(absolute(root), label)
        mixed = getattr(data, f"{stage}_mix")
        setting = f"data.{stage}_mix.{number}.path" if mixed else f"data.{stage}_json"
        asks = stage == "finetune" and held_out is None
        return LlavaFile(
            setting, dataset.path, root, data.test_fraction, asks, prefix, label, held_out=held_out
        )
    try:
        changes = {"captions": dataset.path} | ({"test_fraction": 0.0} if held_out else {})
        alone = data.model_copy(update=changes)
        bundle = captions.build(alone, brief, detailed)
    except DataError as error:
        raise DataError(f"In data.{stage}_mix, dataset {label!r}: {error.what}", error.remedy) from error
    prefix = prefixes.of(f"captions {absolute(dataset.path)}", label)
    return _Captions(bundle, stage, prefix, label, held_out)


@dataclass(frozen=True)
class _Captions:
    """A dataset of captioned images under its name."""

    bundle: DatasetBundle
    stage: StageName
    prefix: str
    label: str
    held_out: LlavaFile | None

    @functools.cached_property
    def _left_out(self) -> frozenset[str]:
        """Images that are for questions alone."""
        uris = self.held_out.image_uris if self.held_out else frozenset()
        return frozenset(image.image_id for image in self.bundle.images if image.uri in uris)

    def samples(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Sample]:
        rejects.extend(self.bundle.rejected)
        for sample in self.bundle.pretrain if self.stage == "pretrain" else self.bundle.finetune:
            if not self._left_out.isdisjoint(sample.image_ids):
                continue
            image_ids = tuple(self.prefix + image_id for image_id in sample.image_ids)
            name = f"{self.label}/{sample.sample_id}"
            yield replace(sample, sample_id=name, image_ids=image_ids, dataset=self.label)

    def images(self) -> Iterator[ImageRecord]:
        for image in self.bundle.images:
            if image.image_id in self._left_out:
                continue
            if image.split == "train" or self.stage == "finetune":
                yield replace(image, image_id=self.prefix + image.image_id)

    def questions(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Question]:
        for question in self.bundle.questions:
            name, image_id = f"{self.label}/{question.question_id}", self.prefix + question.image_id
            yield replace(question, question_id=name, image_id=image_id)
