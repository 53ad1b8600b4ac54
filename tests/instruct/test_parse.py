"""Parsing: what is written is read back, each failure has its reason, and nothing else ever comes out."""

import random
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import REASONS, Pair, Rejected, detail_question, parse
from rayva.instruct.prompts import FOLDERS, PromptSet
from rayva.text.instructions import DETAILED

KINDS: tuple[Kind, ...] = get_args(Kind)
GOOD = "Question:\nWhat is it?\n===\nAnswer:\nIt is a dog."


def _write(pairs: list[Pair]) -> str:
    return "\n===\n".join(f"Question:\n{p.question}\n===\nAnswer:\n{p.answer}" for p in pairs)


_words = st.text("abcde éß漢-,'", min_size=1, max_size=30).filter(lambda s: any(c.isalnum() for c in s))
_sentence = _words.map(lambda s: s.strip() + ".")
_pairs = st.lists(
    st.builds(Pair, _words.map(lambda s: s.strip() + "?"), st.lists(_sentence, min_size=1).map("\n\n".join)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(_pairs)
def test_what_is_written_is_read_back(pairs: list[Pair]) -> None:
    assert parse("conversation", _write(pairs), "stop") == pairs
    assert parse("reasoning", _write(pairs[:1]), None) == pairs[:1]
    assert parse("detail", pairs[0].answer, None) == [Pair("", pairs[0].answer)]


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is it?\n===\nAnswer: It is a dog.",
        "question :\r\nWhat is it?\r\n====\r\nANSWER:\r\nIt is a dog.\r\n",
        "**Question 1:**\nWhat is it?\n\n===\n\n**Answer 1:**\n\nIt is a dog.\n===\n",
        "===\n### Question:\nWhat is it?\n  ===  \n### Answer:\nIt is a dog.",
        "```\nQuestion:\nWhat is it?\n===\nAnswer:\nIt is a dog.\n```",
        "<think>\nAnswer: ... ===\n</think>\n\nQuestion:\nWhat is it?\n===\nAnswer:\nIt is a dog.",
        "The opening tag was in the prompt.</think>Question:\nWhat is it?\n===\nAnswer:\nIt is a dog.",
        "\ufeffQuestion:\nWhat is it?\n===\n===\nAnswer:\nIt is a dog.",
    ],
)
def test_harmless_variation_is_read_over(text: str) -> None:
    assert parse("conversation", text, "stop") == [Pair("What is it?", "It is a dog.")]


@pytest.mark.parametrize(
    ("reason", "kind", "text", "finish"),
    [
        ("empty", "conversation", " \n", "stop"),
        ("empty", "detail", None, "stop"),
        ("empty", "detail", "<think>I need not say anything.</think>", "stop"),
        ("cut", "detail", "<think>\nThe user wants a description. Let me think.", "stop"),
        ("cut", "conversation", GOOD, "length"),
        ("cut", "conversation", GOOD + "\n===\nQuestion:\nWhere is", None),
        ("cut", "conversation", "Question:\nWhat?\n===\nAnswer:\nThe dog sits on the", "stop"),
        ("cut", "detail", "There is a dog in the garden and it looks at a", None),
        ("cut", "detail", "There is a dog in the green garden and it looks happy", None),
        ("cut", "detail", "A dog and a cat are lying on a couch near the wi", "stop"),
        ("cut", "detail", "Two things to see:\n- A dog on a couch.\n- A lamp near the wi", "stop"),
        ("cut", "reasoning", "Question:\nHow is it?\n===\nAnswer:\nIt seems to be slee", "stop"),
        ("cut", "conversation", "Question:\nHow?\n===\nAnswer:\nThe dog is on the couch and is slee", "stop"),
        ("cut", "conversation", GOOD + "\n===\nQuestion:\nWhat?\n===\nAnswer:\nThe dog is slee", "stop"),
        ("cut", "conversation", GOOD, "content_filter"),
        ("invalid_text", "detail", "A dog\ud800 sits.", "stop"),
        ("invalid_text", "detail", "A dog\x00 sits.", "stop"),
        ("invalid_text", "conversation", GOOD.replace("dog", "<image>"), "stop"),
        ("missing_separator", "conversation", "A dog sits in the garden.", "stop"),
        ("missing_separator", "conversation", "<html>502 Bad Gateway</html>", "stop"),
        ("text_around", "detail", GOOD, "stop"),
        ("text_around", "detail", "A dog.\n===\nA cat.", "stop"),
        ("missing_separator", "conversation", "Question:\nWhat?\nAnswer:\nA dog.", "stop"),
        ("missing_separator", "conversation", GOOD + "\nQuestion:\nWhat?\n===\nAnswer:\nOk.", "stop"),
        ("text_around", "conversation", "Sure!\n" + GOOD, "stop"),
        ("text_around", "conversation", GOOD + "\n===\nI hope that this helps.", "stop"),
        ("roles_swapped", "conversation", "Answer:\nA dog.\n===\nQuestion:\nWhat?", "stop"),
        ("roles_swapped", "conversation", "Question:\nA?\n===\nQuestion:\nB?\n===\nAnswer:\nC.", "stop"),
        ("roles_swapped", "conversation", "Question:\nIt is red.\n===\nAnswer:\nWhat is red?", "stop"),
        ("empty_question", "conversation", "Question:\n\n===\nAnswer:\nA dog.", "stop"),
        ("empty_answer", "conversation", "Question:\nWhat?\n===\nAnswer:\n", "stop"),
        ("empty_answer", "detail", "...", "stop"),
        ("wrong_count", "reasoning", GOOD + "\n===\n" + GOOD, "stop"),
    ],
)
def test_each_failure_has_its_reason(reason: str, kind: Kind, text: str | None, finish: str) -> None:
    with pytest.raises(Rejected) as refused:
        parse(kind, text, finish)
    assert refused.value.reason == reason


def test_short_answers_and_lists_need_no_full_stop() -> None:
    assert parse("conversation", "Question:\nWhat color?\n===\nAnswer:\nRed", "stop")[0].answer == "Red"
    listed = "Bring these:\n\n1. Warm clothes for the night\n2. Enough water for the whole day"
    assert (
        parse("reasoning", f"Question:\nWhat to bring?\n===\nAnswer:\n{listed}", "stop")[0].answer == listed
    )


@pytest.mark.parametrize(
    "answer",
    [
        "It leaves from Platform A",
        "They meet in Hall A",
        "Red and white (with a little bit of blue at the edges)",
        'On the sign at the side of the road is "Stop and look for trains"',
        "The dog on the couch looks as if it were asleep \U0001f436",
        "The dog on the couch looks as if it were asleep \u2764\ufe0f",
        "**The dog on the couch looks as if it were asleep**",
    ],
)
def test_answers_may_end_without_a_full_stop(answer: str) -> None:
    assert parse("conversation", f"Question:\nWhat?\n===\nAnswer:\n{answer}", "stop")[0].answer == answer


@pytest.mark.parametrize(
    "text",
    [
        "两只狗在玩耍。",
        "犬が眠っている。」",
        "สุนัขนอน",
        "कुत्ता सोता है।",
        "الكلب ينام.",
        "Он сказал: «Стой!»",
    ],
    ids=["chinese", "japanese", "thai", "hindi", "arabic", "russian"],
)
def test_sentences_of_other_scripts_are_closed(text: str) -> None:
    assert parse("detail", text, "stop") == [Pair("", text)]


def _mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randint(1, 60))
        lines = text.split("\n")
        row = rng.randrange(len(lines))
        junk = rng.choice(
            ["===", "Answer:", "Question:", "\x00", "<image>", "\ud83d", "{'a':", "漢", "\r", "="]
        )
        text = rng.choice(
            [
                text[:at],
                text[at:],
                text[:at] + text[end:],
                text[:at] + junk + text[at:],
                text.replace("===", rng.choice(["", "==", "---", "=== ===", "=====  "])),
                text.replace("Question", "Answer")
                if rng.random() < 0.5
                else text.replace("Answer", "Question"),
                "\n".join(lines[:row] + lines[row + 1 :]),
                "\n".join(lines[:row] + [lines[row]] * 2 + lines[row:]),
                "\n".join(rng.sample(lines, len(lines))),
                text.swapcase(),
                "".join(chr(rng.randrange(0x11000)) for _ in range(50)),
            ]
        )
    return text


def _examples(kind: Kind) -> list[tuple[str, str]]:
    """What the shipped prompts show and what they answer."""
    middle = [m["content"] for m in PromptSet.load().messages(kind, Context("1", "1.jpg", ("A dog.",)), True)]
    return list(zip(middle[1:-1:2], middle[2:-1:2], strict=True))


def _outcome(kind: Kind, text: str, finish: str | None) -> tuple[str, list[Pair]]:
    try:
        return "accepted", parse(kind, text, finish)
    except Rejected as refused:
        return refused.reason, []


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations_are_read_or_refused_with_a_documented_reason(kind: Kind) -> None:
    examples = [answer for p in FOLDERS for _, answer in _examples(p)]
    outcomes: set[str] = set()
    for seed in range(1000):
        rng = random.Random(f"{kind}/{seed}")
        mutated = _mutate(rng.choice(examples), rng)
        outcome, pairs = _outcome(kind, mutated, rng.choice(["stop", "length", None, "tool_calls"]))
        outcomes.add(outcome)
        assert outcome == "accepted" or outcome in REASONS
        assert bool(pairs) == (outcome == "accepted")
        for pair in pairs:
            pair.answer.encode("utf-8")
            assert pair.answer.strip() == pair.answer != ""
            assert not re.search(r"(?m)^\s*={3,}\s*$|<image>", pair.question + "\n" + pair.answer)
    assert {"accepted", "cut", "text_around"} <= outcomes


def test_detail_questions_follow_the_seed() -> None:
    assert detail_question("7", 0) == detail_question("7", 0)
    drawn = {detail_question(str(number), 0) for number in range(500)}
    assert drawn == set(DETAILED)
