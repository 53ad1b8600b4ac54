"""The built-in dataset of drawn scenes, with instruction data from the symbolic teacher."""

from __future__ import annotations

import random
from collections.abc import Iterator

from rayva.data import scenes
from rayva.data.bundle import DatasetBundle, Lazy
from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Question, Sample, Split, Turn
from rayva.instruct import symbolic
from rayva.recipes.schema import Data
from rayva.text.instructions import BRIEF, choose_instruction

QUESTIONS_PER_SCENE = 3
_MIX: tuple[symbolic.ResponseType, ...] = ("conversation",) * 27 + ("detail", "detail", "complex")
"""Response types by turns. Conversations outweigh the paper's share: they are what the gate asks."""
_STRIDE = 7
"""Coprime to the length of `_MIX`, so that each scene gets a fair share of each type."""


def build(data: Data) -> DatasetBundle:
    """Scenes of the three splits; samples from the training scenes, questions about the test scenes.

    Everything is drawn anew each time it is read, from `data.seed` alone.
    """

    def records(split: Split, count: int) -> Iterator[ImageRecord]:
        return (record for _, record in scenes.generate(split, count, data.seed))

    def images() -> Iterator[ImageRecord]:
        yield from records("train", data.train_scenes)
        yield from records("validation", data.validation_scenes)
        yield from records("test", data.test_scenes)

    def pretrain() -> Iterator[Sample]:
        return (_caption_sample(record, data.seed) for record in records("train", data.train_scenes))

    def finetune() -> Iterator[Sample]:
        for number, record in enumerate(records("train", data.train_scenes)):
            yield from _conversations(record, number, data)

    def questions() -> Iterator[Question]:
        for record in records("test", data.test_scenes):
            yield from _questions(record, data.seed)

    return DatasetBundle(Lazy(images), Lazy(pretrain), Lazy(finetune), Lazy(questions))


def _caption_sample(record: ImageRecord, seed: int) -> Sample:
    question = f"{IMAGE_PLACEHOLDER}\n{choose_instruction(BRIEF, seed, record.image_id)}"
    answer = symbolic.detail(record, random.Random(f"{seed}/caption/{record.image_id}"))
    turns = (Turn("human", question), Turn("gpt", answer))
    return Sample(f"{record.image_id}-caption", (record.image_id,), turns, "caption")


def _conversations(record: ImageRecord, number: int, data: Data) -> Iterator[Sample]:
    for repeat in range(data.samples_per_image):
        kind = _MIX[(_STRIDE * number + repeat) % len(_MIX)]
        turns = symbolic.respond(record, kind, data.seed + repeat, data.questions_per_sample)
        if turns:
            yield Sample(f"{record.image_id}-{kind}-{repeat}", (record.image_id,), turns, kind)


def _questions(record: ImageRecord, seed: int) -> Iterator[Question]:
    rng = random.Random(f"{seed}/questions/{record.image_id}")
    for number, asked in enumerate(symbolic.questions(record, rng, QUESTIONS_PER_SCENE)):
        yield Question(
            question_id=f"{record.image_id}-{number}",
            image_id=record.image_id,
            task="grounding",
            kind=asked.kind,
            question=asked.question,
            accepted=(asked.answer,),
        )
