"""LLaVA turns as messages, and where images stand in them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rayva.data.schema import Turn
from rayva.text.conversation import (
    IMAGE,
    BadConversation,
    Content,
    Message,
    messages_from_turns,
    place_image,
)


def contents(turns: list[tuple[Any, str]], n_images: int) -> list[Content]:
    messages = messages_from_turns([Turn(role, text) for role, text in turns], n_images)
    return [message.content for message in messages]


def test_markers_become_slots_where_they_stand() -> None:
    turns = [("human", "Compare <image> with <image>"), ("gpt", "Equal.")]
    assert contents(turns, 2) == [("Compare ", IMAGE, " with ", IMAGE), ("Equal.",)]


def test_images_without_markers_go_in_front_of_the_first_human_turn() -> None:
    turns = [("gpt", "Hello."), ("human", "What is it?"), ("gpt", "A boat.")]
    assert contents(turns, 2) == [("Hello.",), (IMAGE, "\n", IMAGE, "\nWhat is it?"), ("A boat.",)]


def test_markers_of_text_rows_and_of_answers_are_text() -> None:
    assert contents([("human", "Write <image>"), ("gpt", "<image>")], 0) == [("Write <image>",), ("<image>",)]
    assert contents([("human", "<image>"), ("gpt", "<image>")], 1) == [(IMAGE,), ("<image>",)]


@pytest.mark.parametrize(
    ("turns", "n_images", "reason"),
    [
        ([], 0, "no_turns"),
        ([("robot", "hi")], 0, "unknown_role"),
        ([("human", "<image><image>"), ("gpt", "x")], 1, "more_markers_than_images"),
        ([("human", "<image>"), ("gpt", "x")], 2, "fewer_markers_than_images"),
        ([("gpt", "x")], 1, "no_human_turn"),
    ],
)
def test_bad_conversations_are_refused_with_a_reason(
    turns: list[tuple[Any, str]], n_images: int, reason: str
) -> None:
    with pytest.raises(BadConversation) as caught:
        contents(turns, n_images)
    assert caught.value.reason == reason


class TestPlaceImage:
    messages = (
        Message("user", ("What is ", IMAGE, " about?")),
        Message("assistant", ("Boats.",)),
        Message("user", ("And this? ", IMAGE)),
    )

    def test_data_leaves_it(self) -> None:
        assert place_image(self.messages, "data", random.Random(0)) == list(self.messages)

    def test_front_moves_all(self) -> None:
        placed = place_image(self.messages, "front", random.Random(0))
        assert [m.content for m in placed] == [
            (IMAGE, "\nWhat is  about?"),
            ("Boats.",),
            (IMAGE, "\nAnd this?"),
        ]

    def test_front_keeps_every_image_of_a_turn(self) -> None:
        (placed,) = place_image([Message("user", (IMAGE, " ", IMAGE))], "front", random.Random(0))
        assert placed.content == (IMAGE, "\n", IMAGE)

    def test_random_moves_the_first_to_either_side_with_equal_chance(self) -> None:
        rng = random.Random(3)
        drawn = [place_image(self.messages, "random", rng) for _ in range(400)]
        before, after = (IMAGE, "\nWhat is  about?"), ("What is  about?\n", IMAGE)
        count = sum(messages[0].content == before for messages in drawn)
        assert 150 < count < 250
        assert sum(messages[0].content == after for messages in drawn) == 400 - count
        assert all(messages[1:] == list(self.messages[1:]) for messages in drawn)
