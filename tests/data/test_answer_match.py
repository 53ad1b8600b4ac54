"""Grading sentences by what their question asks for: what can be graded, and what is right."""

import json
import random

import pytest

from rayva.data.answer_match import find_part, how_to_grade
from rayva.evaluation.score import is_right
from tests.reference import LLAVA_DATA, needs


@pytest.mark.parametrize(
    ("question", "answer", "match"),
    [
        ("How many dogs are there?", "Two.", "text"),
        ("How many dogs are there?", "There are two dogs in the picture.", "number"),
        ("What is the number of dogs?", "I can count 12 dogs in there.", "number"),
        ("How many dogs are there?", "It is hard to say from here.", None),
        ("Is there a dog in the picture?", "Yes, a dog sits on the left.", "yes_no"),
        ("Are they outside or inside the house?", "No, they are inside of the house.", None),
        ("Isn't it a nice day?", "No, it is raining all day long.", "yes_no"),
        ("Is the man old?", "The man looks as if he were old.", None),
        ("What color is the cat?", "The cat on the sofa is grey.", "color"),
        ("Which colours do the flags have?", "The flags are red, white and blue.", "color"),
        ("What is the color of the cat?", "The cat has no color to speak of.", None),
        ("Why is the dog wet?", "It has been swimming in the lake.", None),
        ("What is it?", "", None),
    ],
)
def test_what_can_be_graded(question: str, answer: str, match: str | None) -> None:
    assert how_to_grade(question, answer) == match


@pytest.mark.parametrize(
    ("match", "answer", "right", "wrong"),
    [
        ("number", "There are three people: two women and a man.", ["3", "Three.", "I see three."], ["Two."]),
        (
            "number",
            "There are no dogs in the picture.",
            ["Zero", "There are no dogs."],
            ["One", "There are."],
        ),
        ("number", "1,200 birds were counted in there.", ["1200 birds"], ["1", "200"]),
        ("yes_no", "Yes, a dog sits on the left.", ["yes", "Yes, it does."], ["No.", "Yesterday", "A dog."]),
        ("color", "It is red, white and blue.", ["Blue, white and red"], ["Red", "Red and blue.", "Nice."]),
        ("color", "The cat on the sofa is grey.", ["Gray."], ["black", ""]),
    ],
)
def test_what_is_right(match: str, answer: str, right: list[str], wrong: list[str]) -> None:
    assert all(is_right(said, [answer], match) for said in [answer, *right])
    assert not any(is_right(said, [answer], match) for said in wrong)


def test_words_in_any_order_find_a_part_or_none() -> None:
    rng = random.Random(3)
    pieces = ["yes", "no", "two", "7", "1,000", "red", "grey", "\u0663", "\ud800", "", "'", "\n", "one", ","]
    for _ in range(2000):
        text = rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(0, 6)))
        for match in ("yes_no", "number", "color"):
            part = find_part(match, text)
            assert part is None or find_part(match, part) == part


@needs(LLAVA_DATA)
def test_answers_of_gpt4_in_sentences_are_graded() -> None:
    """Of the released conversations about counts, colours and yes or no, all but one can be graded."""
    lines = (LLAVA_DATA / "qa90_questions.jsonl").read_text().splitlines()
    asked = {row["question_id"]: row["text"] for row in map(json.loads, lines)}
    graded: dict[str, list[str]] = {}
    for row in map(json.loads, (LLAVA_DATA / "qa90_gpt4_answer.jsonl").read_text().splitlines()):
        if match := how_to_grade(asked[row["question_id"]], row["text"]):
            graded.setdefault(match, []).append(str(find_part(match, row["text"])))
    assert graded == {
        "color": ["black brown yellow", "black", "gray"],
        "number": ["3", "4", "4", "2", "3"],
        "yes_no": ["yes"],
    }
