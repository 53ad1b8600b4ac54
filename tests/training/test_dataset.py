"""Samples: what is left out, cut, dropped, counted, and drawn at random."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
import torch

from rayva.data.schema import SAMPLES
from rayva.errors import DataError, RecipeError
from rayva.model.batch import collate
from rayva.text.encode import IMAGE_TOKEN_INDEX
from rayva.text.templates import get_template
from rayva.training.dataset import SampleSource, TextSettings
from rayva.training.lengths import require_answers
from rayva.training.plan import TrainingPlan
from rayva.training.prefetch import Ahead, Share, prefetch, prepare_step
from tests.training.support import (
    TOKENS_PER_IMAGE,
    VISION_HIDDEN,
    TinyFeatures,
    tiny_samples,
    tiny_source,
    tiny_tokenizer,
)


def _source(rows: list[tuple[list[str], list[tuple[str, str]]]], known: int = 8, **settings: object):
    table = pa.Table.from_pylist(
        [
            {
                "sample_id": f"s{i}",
                "image_ids": images,
                "turns": [{"role": role, "text": text} for role, text in turns],
                "kind": "user",
            }
            for i, (images, turns) in enumerate(rows)
        ],
        schema=SAMPLES,
    )
    tokenizer = tiny_tokenizer()
    text = TextSettings(get_template("v1", tokenizer=tokenizer, system=""), **settings)  # type: ignore[arg-type]
    names = pa.array([f"image{i}" for i in range(known)])
    return SampleSource(table, names, TinyFeatures(), text, tokenizer)


ASK = [("human", "<image>\nwhat is it?"), ("gpt", "a red circle")]


def test_samples_of_quarantined_images_are_left_out_and_counted() -> None:
    both = [("human", "<image><image>\nwhat?"), ("gpt", "two")]
    rows = [
        (["image0"], ASK),
        (["image9"], ASK),
        (["image1", "image9"], both),
        ([], [("human", "hi"), *ASK[1:]]),
    ]
    source = _source(rows)
    assert len(source) == 2
    assert source.left_out == {"image_quarantined": 2}
    ids = [source.example(index, 0, Counter()).sample_id for index in range(2)]
    assert ids == ["s0", "s3"]


def test_an_empty_table_is_an_error() -> None:
    with pytest.raises(DataError):
        _source([])


def test_truncation_counts_image_tokens_and_keeps_features_in_step() -> None:
    whole = _source([(["image0"], ASK)]).example(0, 0, Counter())
    assert sum(token == IMAGE_TOKEN_INDEX for token in whole.input_ids) == TOKENS_PER_IMAGE
    cut_at = whole.input_ids.index(IMAGE_TOKEN_INDEX) + 2
    counts: Counter[str] = Counter()
    source = _source([(["image0"], ASK)], max_tokens=cut_at)
    example = source.example(0, 0, counts)
    assert example.input_ids == whole.input_ids[:cut_at]
    assert counts == {"truncated": 1, "without_answer": 1}
    (row,) = source.rows([example])
    assert torch.equal(row.features_MD, TinyFeatures().read(["image0"])[0][:2])


def test_over_length_samples_are_dropped_and_counted() -> None:
    counts: Counter[str] = Counter()
    source = _source([(["image0"], ASK)], max_tokens=16, over_length="drop")
    assert source.example(0, 0, counts) is None
    assert counts == {"dropped_over_length": 1}


@pytest.mark.parametrize("over_length", ["truncate", "drop"])
def test_a_limit_that_cuts_off_every_answer_is_refused(over_length: str) -> None:
    length = len(_source([(["image0"], ASK)]).example(0, 0, Counter()).input_ids)
    with pytest.raises(RecipeError) as caught:
        require_answers(_source([(["image0"], ASK)] * 3, max_tokens=16, over_length=over_length), "pretrain")
    said = str(caught.value)
    assert "None of 3 samples of pretrain that were looked at (of 3) keeps an answer" in said
    assert f"conversation.max_tokens=16, of which {TOKENS_PER_IMAGE} go to each image" in said
    assert f"{length} to {length} tokens" in said
    assert f"set conversation.max_tokens={length}," in said
    require_answers(_source([(["image0"], ASK)], max_tokens=length, over_length=over_length), "pretrain")


def test_a_limit_that_cuts_off_some_answers_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    long = [("human", "<image>\n" + "what is it? " * 9), *ASK[1:]]
    short = len(_source([(["image0"], ASK)]).example(0, 0, Counter()).input_ids)
    require_answers(
        _source([(["image0"], ASK)] * 1000 + [(["image0"], long)] * 500, max_tokens=short), "pretrain"
    )
    said = capsys.readouterr().err
    assert "warning: 85 of 256 samples of pretrain that were looked at (of 1,500) keep no answer" in said
    require_answers(tiny_source(30), "pretrain")
    assert capsys.readouterr().err == ""


def test_samples_that_cannot_be_encoded_at_all_are_refused_with_the_reasons() -> None:
    with pytest.raises(DataError, match="2 dropped_unknown_role"):
        require_answers(_source([(["image0"], [("robot", "hi")])] * 2), "pretrain")


def test_unusable_conversations_are_counted_by_reason() -> None:
    counts: Counter[str] = Counter()
    assert _source([(["image0"], [("robot", "hi")])]).example(0, 0, counts) is None
    assert counts == {"dropped_unknown_role": 1}


def test_random_image_places_depend_on_seed_epoch_and_index_alone() -> None:
    rows = [(["image0"], ASK)] * 40

    def places(seed: int, epoch: int) -> list[int]:
        source = _source(rows, image_position="random", seed=seed)
        found = [source.example(i, epoch, Counter()).input_ids.index(IMAGE_TOKEN_INDEX) for i in range(40)]
        assert len(set(found)) == 2
        return found

    assert places(0, 0) == places(0, 0)
    assert len({tuple(places(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_steps_are_the_same_whatever_the_world_size() -> None:
    source, plan = tiny_source(30), TrainingPlan(30, 8, 1, 0, "digest")
    alone = prepare_step(1, plan, source, Share(0, 1, 4), VISION_HIDDEN)
    ranks = [prepare_step(1, plan, source, Share(rank, 3, 2), VISION_HIDDEN) for rank in range(3)]
    assert all(rank.sample_ids == alone.sample_ids for rank in ranks)
    assert all(rank.supervised == alone.supervised for rank in ranks)
    assert len({len(rank.micro_batches) for rank in ranks}) == 1
    supervised = sum(int((b.labels_BT[:, 1:] != -100).sum()) for rank in ranks for b in rank.micro_batches)
    assert supervised == alone.supervised


def test_prefetched_steps_come_in_order_and_errors_at_their_step() -> None:
    class Failing(TinyFeatures):
        def read(self, image_ids):  # type: ignore[no-untyped-def]
            raise OSError("the disk is gone")

    plan = TrainingPlan(30, 8, 1, 0, "digest")
    with prefetch(1, plan, tiny_source(30), Share(0, 1, 4), VISION_HIDDEN) as steps:
        assert [prepared.step for prepared, _ in steps] == [1, 2, 3]
    source = tiny_source(30)
    source._features = Failing()
    with (
        pytest.raises(OSError, match="the disk is gone"),
        prefetch(0, plan, source, Share(0, 1, 4), VISION_HIDDEN) as steps,
    ):
        next(steps)


def test_reading_ahead_keeps_within_its_memory_from_the_first_step_on() -> None:
    ahead = Ahead(steps=3, mebibytes=2)
    assert [ahead.room(pending, None) for pending in (0, 1)] == [True, False]
    assert [ahead.room(pending, 2**20) for pending in (0, 1, 2)] == [True, True, False]
    assert [ahead.room(pending, 2**30) for pending in (0, 1)] == [True, False]
    assert [ahead.room(pending, 0) for pending in (0, 1, 2, 3)] == [True, True, True, False]


@pytest.mark.parametrize("encodes", [False, True])
def test_reading_ahead_takes_no_core_from_training_unless_it_encodes(encodes: bool) -> None:
    told: list[int] = []

    class Telling(TinyFeatures):
        def read(self, image_ids):  # type: ignore[no-untyped-def]
            told.append(torch.get_num_threads())
            return super().read(image_ids)

    Telling.encodes = encodes
    source = tiny_source(30)
    source._features = Telling()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with prefetch(0, TrainingPlan(30, 8, 1, 0, "d"), source, Share(0, 1, 4), VISION_HIDDEN) as steps:
            list(steps)
        assert set(told) == {2 if encodes else 1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_rank_without_samples_has_a_batch_without_supervision() -> None:
    batch = collate([], VISION_HIDDEN)
    assert batch.input_ids_BT.shape == (1, 1)
    assert batch.features_MD.shape == (0, VISION_HIDDEN)
    assert int((batch.labels_BT != -100).sum()) == 0


def test_every_sample_encodes() -> None:
    source = tiny_source(40)
    counts: Counter[str] = Counter()
    examples = [source.example(index, 0, counts) for index in range(len(source))]
    assert [e.sample_id for e in examples] == tiny_samples(40)["sample_id"].to_pylist()
    assert not counts
    assert all(e.supervised > 0 for e in examples)
