"""Several datasets as one: the samples of each stage lie together by dataset and carry its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, Protocol

from rayva.data import captions
from rayva.data.bundle import DatasetBundle, Lazy
from rayva.data.llava_json import LlavaFile, distinct, held_out_file
from rayva.data.locations import absolute, parent
from rayva.data.schema import ImageRecord, Question, Rejected, Sample
from rayva.data.splits import UniqueIds
from rayva.errors import DataError
from rayva.recipes.schema import Data, Dataset

StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune")


def build(data: Data, brief: Sequence[str], detailed: Sequence[str]) -> DatasetBundle:
    """The tables of a recipe with `pretrain_mix` or `finetune_mix`.

    Ids of samples and questions are `DATASET/ID`. Images of one folder keep one id in all datasets and both
    stages, `DATASET://NAME` after the first of them; what is held out follows from the name alone, so a
    picture that two datasets share is on the same side.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    rejects: list[Rejected] = []
    prefixes = _Prefixes()
    tested = held_out_file(data)
    held_out = tested.uris() if tested else None
    sources: dict[StageName, list[_Source]] = {
        stage: [
            _source(data, dataset, stage, number, prefixes, brief, detailed, held_out)
            for number, dataset in enumerate(data.datasets(stage))
        ]
        for stage in STAGES
    }

    def every(stage: StageName, take: Callable[[_Source], Iterable[Sample]]) -> Lazy[Sample]:
        return Lazy(lambda: chain.from_iterable(take(source) for source in sources[stage]))

    both = [*sources["finetune"], *sources["pretrain"]]
    questions = Lazy(lambda: chain.from_iterable(source.questions() for source in sources["finetune"]))
    if tested:
        asked = replace(tested, image_prefix=prefixes.of(absolute(tested.root), "held_out"))
        both.append(asked)
        questions = Lazy(lambda: asked.questions(rejects))
    return DatasetBundle(
        images=Lazy(lambda: distinct(chain.from_iterable(source.images() for source in both))),
        pretrain=every("pretrain", lambda source: source.samples(rejects)),
        finetune=every("finetune", lambda source: source.samples(rejects)),
        questions=questions,
        rejected=rejects,
    )


class _Source(Protocol):
    """One dataset in one stage."""

    def samples(self, rejects: list[Rejected]) -> Iterator[Sample]: ...

    def images(self) -> Iterator[ImageRecord]: ...

    def questions(self) -> Iterator[Question]: ...


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
    brief: Sequence[str],
    detailed: Sequence[str],
    held_out: frozenset[str] | None,
) -> _Source:
    label = dataset.label
    if dataset.format == "llava":
        root = dataset.images or parent(dataset.path)
        prefix = prefixes.of(absolute(root), label)
        mixed = getattr(data, f"{stage}_mix")
        setting = f"data.{stage}_mix.{number}.path" if mixed else f"data.{stage}_json"
        asks = stage == "finetune" and held_out is None
        return LlavaFile(setting, dataset.path, root, data.test_fraction, asks, prefix, label, held_out)
    try:
        alone = data.model_copy(update={"captions": dataset.path})
        if held_out is not None:
            alone = alone.model_copy(update={"test_fraction": 0.0})
        bundle = captions.build(alone, brief, detailed)
    except DataError as error:
        raise DataError(f"In data.{stage}_mix, dataset {label!r}: {error.what}", error.remedy) from error
    prefix = prefixes.of(f"captions {absolute(dataset.path)}", label)
    return _Captions(bundle, stage, prefix, label, held_out or frozenset())


@dataclass(frozen=True, slots=True)
class _Captions:
    """A dataset of captioned images under its name."""

    bundle: DatasetBundle
    stage: StageName
    prefix: str
    label: str
    held_out: frozenset[str]
    """URIs of images that are not for training."""

    def samples(self, rejects: list[Rejected]) -> Iterator[Sample]:
        rejects.extend(self.bundle.rejected)
        tested = {image.image_id for image in self._tested()}
        for sample in self.bundle.pretrain if self.stage == "pretrain" else self.bundle.finetune:
            if not tested.isdisjoint(sample.image_ids):
                continue
            image_ids = tuple(self.prefix + image_id for image_id in sample.image_ids)
            name = f"{self.label}/{sample.sample_id}"
            yield replace(sample, sample_id=name, image_ids=image_ids, dataset=self.label)

    def _tested(self) -> Iterator[ImageRecord]:
        """Images that the recipe's own questions are about."""
        return (i for i in self.bundle.images if i.uri in self.held_out) if self.held_out else iter(())

    def images(self) -> Iterator[ImageRecord]:
        for image in self.bundle.images:
            if image.uri in self.held_out:
                continue
            if image.split == "train" or self.stage == "finetune":
                yield replace(image, image_id=self.prefix + image.image_id)

    def questions(self) -> Iterator[Question]:
        for question in self.bundle.questions:
            name, image_id = f"{self.label}/{question.question_id}", self.prefix + question.image_id
            yield replace(question, question_id=name, image_id=image_id)
