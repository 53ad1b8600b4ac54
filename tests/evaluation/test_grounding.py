from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data.schema import Question
from rayva.evaluation.grounding import batches, derange, plan_asks


def question(number: int, image_id: str, task: str = "grounding") -> Question:
    return Question(f"{task}/{number}", image_id, task, "color", f"What is {'it' * number}?", ("red",))


image_keys = st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from("abcdefgh"), min_size=1)


@settings(deadline=None)
@given(image_keys, st.text(max_size=3))
def test_every_image_gets_one_with_other_content(keys: dict[str, str], seed: str) -> None:
    other = derange(keys, seed)
    assert other.keys() == keys.keys()
    if len(set(keys.values())) > 1:
        assert all(keys[image_id] != keys[replaced] for image_id, replaced in other.items())
    else:
        assert other == {image_id: image_id for image_id in keys}


@settings(deadline=None)
@given(st.integers(2, 50), st.text(max_size=3))
def test_distinct_images_are_permuted(count: int, seed: str) -> None:
    keys = {f"i{n}": f"k{n}" for n in range(count)}
    assert sorted(derange(keys, seed).values()) == sorted(keys)


def test_the_seed_decides_the_order_of_images_does_not() -> None:
    keys = {f"i{n}": f"k{n}" for n in range(30)}
    backwards = dict(reversed(keys.items()))
    assert derange(keys, "1") == derange(backwards, "1")
    assert derange(keys, "1") != derange(keys, "2")


def test_each_question_is_asked_under_each_condition_and_text_once() -> None:
    questions = [question(n, f"i{n % 4}") for n in range(8)] + [question(n, "", "text") for n in range(3)]
    plan = plan_asks(questions, {f"i{n}": f"k{n}" for n in range(4)}, None, 0)
    assert plan.left_out == {}
    asked = Counter((ask.question.question_id, ask.condition) for ask in plan.asks)
    assert set(asked.values()) == {1}
    assert len(asked) == 8 * 3 + 3
    for ask in plan.asks:
        right = ask.question.image_id
        slots = sum(message.num_images for message in ask.messages())
        assert slots == (ask.image_id is not None)
        assert ask.messages()[0].text.strip() == ask.question.question
        if ask.condition == "right_image":
            assert ask.image_id == right
        elif ask.condition == "shuffled_images":
            assert ask.image_id not in (None, right)
        else:
            assert ask.image_id is None


def test_an_image_marker_in_a_question_is_only_text() -> None:
    odd = Question("q", "i", "grounding", "k", "What does <image> mean?", ("a tag",))
    asks = plan_asks([odd], {"i": "k", "j": "l"}, None, 0).asks
    assert [ask.messages()[0].num_images for ask in asks] == [1, 1, 0]


def test_questions_about_quarantined_images_are_left_out_and_counted() -> None:
    plan = plan_asks([question(0, "good"), question(1, "bad")], {"good": "k", "good2": "l"}, None, 0)
    assert {ask.question.image_id for ask in plan.asks} == {"good"}
    assert plan.left_out == {"image_quarantined": 1}


def test_max_questions_keeps_the_same_ones_of_each_task() -> None:
    questions = [question(n, f"i{n}") for n in range(20)] + [question(n, f"i{n}", "names") for n in range(5)]
    keys = {f"i{n}": f"k{n}" for n in range(20)}
    plan = plan_asks(questions, keys, 6, 0)
    assert plan.left_out == {"over_max_questions": 14}
    kept = Counter(ask.question.task for ask in plan.asks)
    assert kept == {"grounding": 18, "names": 15}
    assert plan_asks(reversed(questions), keys, 6, 0).left_out == plan.left_out
    again = {ask.question.question_id for ask in plan_asks(reversed(questions), keys, 6, 0).asks}
    assert again == {ask.question.question_id for ask in plan.asks}


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9))
def test_batches_hold_every_ask_once_whatever_their_order(count: int, size: int) -> None:
    keys = {f"i{n}": f"k{n}" for n in range(5)}
    asks = plan_asks([question(n, f"i{n % 5}") for n in range(count)], keys, None, 0).asks
    dealt = batches(asks, size)
    assert [len(batch) <= size for batch in dealt] == [True] * len(dealt)
    assert sorted(map(id, (ask for batch in dealt for ask in batch))) == sorted(map(id, asks))
    assert batches(asks[::-1], size) == dealt
