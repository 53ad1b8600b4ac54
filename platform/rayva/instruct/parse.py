"""Reads what a teacher wrote: questions and answers, or why they cannot be used."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from rayva.instruct.contexts import Kind
from rayva.text.instructions import DETAILED, choose_instruction

REASONS = frozenset(
    {
        "empty", "cut", "missing_separator", "roles_swapped", "empty_question", "empty_answer", "wrong_count",
        "text_around", "invalid_text",
    }
)  # fmt: skip
"""Why `parse` rejects an answer."""

# `===` on a line of its own; teachers also write more of them, or spaces around.
_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
# "Question:", "**Question 2:**", "### Answer:", "Q:" at the head of a block.
_ROLE = re.compile(
    r"\s*(?:#{1,4}\s*)?(?:[*_]{1,2})?(question|answer|q|a)(?:\s*\d{1,2})?\s*(?:[*_]{1,2})?\s*:"
    r"(?:[*_]{1,2})?[ \t]*",
    re.IGNORECASE,
)
_LABEL_INSIDE = re.compile(
    r"^[ \t#*_]*(?:question|answer)(?:[ \t]*\d{1,2})?[ \t*_]*:", re.IGNORECASE | re.MULTILINE
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")
_IMAGE = re.compile(r"<\s*image\s*>", re.IGNORECASE)
_FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)
# What no sentence ends with; but "Platform A" may.
_OPEN_END = re.compile(r"(?:[,;(\-\u2013\u2014]|\b(?:a|(?i:an|the|of|and|or|with|at|from|its|their)))$")
_CLOSED = frozenset(
    ".!?:)]}\"'*`_~>|"
    "\u00bb\u00ab\u2019\u201d\u201c\u2018\u203a\u2026"
    "\u3002\uff01\uff1f\uff0e\uff1a\uff09\uff3d\uff61\u300d\u300f\u3011\u300b\u3009\uff5e"
    "\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4\u0589\u05c3"
)
"""What a sentence ends in, and what may stand behind that; also quotation marks of other languages, and the
full stops of Chinese and Japanese, Arabic, Hindi, Burmese, Amharic, Khmer, Armenian and Hebrew."""
_UNMARKED = re.compile(r"[\u0e00-\u0eff\ufe0f]\Z")
"""Thai and Lao have no full stop; the last is the end of some emoji."""
_ITEM = re.compile(r"[ \t]*(?:[-*+\u2022\u2013]|\d{1,2}[.)]|\(?[a-z][.)])[ \t]+\S")
_SENTENCE_WORDS = 8
"""An answer of so many words is a sentence, and sentences end in a full stop."""
_CLAUSE_WORDS = 4
"""So is one of so many, where the answers before it have full stops."""


class Rejected(Exception):
    """An answer that cannot be used: one of `REASONS`, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        assert reason in REASONS, reason
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


def parse(kind: Kind, text: str | None, finish_reason: str | None = "stop") -> list[Pair]:
    """The pairs in a teacher's answer; a detailed description is an answer whose question is empty.

    Conversations and reasoning are blocks, `Question:` and `Answer:` in turn, with a line `===` between them.
    Spaces, numbers behind the labels, Markdown around them, a fence around all and missing empty lines do no
    harm; the thoughts of a reasoning model are left out. An answer that breaks off is cut even where the
    endpoint does not say so.

    Raises:
        Rejected: the answer is cut, or not in the format.
    """
    text = _without_thoughts((text or "").replace("\r\n", "\n").strip().strip("\ufeff"))
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    if not text:
        raise Rejected("empty")
    if finish_reason in ("length", "content_filter"):
        raise Rejected("cut", f"finish_reason is {finish_reason}")
    if _CONTROL.search(text) or _IMAGE.search(text):
        raise Rejected("invalid_text", "control or damaged characters, or an image mark")
    pairs = [Pair("", _plain(text))] if kind == "detail" else _pairs(text)
    if kind == "reasoning" and len(pairs) != 1:
        raise Rejected("wrong_count", f"{len(pairs)} questions where one was asked for")
    for pair in pairs:
        _check_pair(pair)
    _check_end(kind, [pair.answer for pair in pairs])
    return pairs


def _without_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts, where the endpoint has left those in.

    The tag that opens them may be missing: templates put it into the prompt.
    """
    _, closed, said = text.rpartition("</think>")
    if not closed and text.startswith("<think>"):
        raise Rejected("cut", "it ends within its thoughts")
    return said.strip() if closed else text


def detail_question(context_id: str, seed: int) -> str:
    """The question that a detailed description answers: one of our 16, the same for the same arguments."""
    return choose_instruction(DETAILED, seed, context_id)


def _plain(text: str) -> str:
    if _SEPARATOR.search(text) or _LABEL_INSIDE.search(text):
        raise Rejected("text_around", "a description has no questions and separators in it")
    return text


def _check_pair(pair: Pair) -> None:
    if not re.search(r"\w", pair.answer):
        raise Rejected("empty_answer", pair.answer[:80])
    if pair.answer.endswith("?") and pair.question.endswith("."):
        raise Rejected("roles_swapped", pair.question[:80])


def _check_end(kind: Kind, answers: list[str]) -> None:
    """The last sentence must be whole; endpoints say "stop" of what breaks off in a word, too.

    What is short in a conversation is perhaps no sentence: "Red", "Platform A".
    """
    *before, answer = answers
    fewest = _CLAUSE_WORDS if before and all(map(_is_closed, before)) else _SENTENCE_WORDS
    is_sentence = kind != "conversation" or len(answer.split()) >= fewest
    if _OPEN_END.search(answer) or (is_sentence and not _is_closed(answer)):
        raise Rejected("cut", f"it ends in {answer[-40:]!r}")


def _is_closed(answer: str) -> bool:
    """Whether it ends in a mark, a picture (an emoji), or a list whose items all go without."""
    last = answer[-1]
    if last in _CLOSED or _UNMARKED.search(answer) or unicodedata.category(last) in ("So", "Sk", "Cf"):
        return True
    *before, item = answer.splitlines()
    items = [line.rstrip() for line in before if _ITEM.match(line)]
    return bool(_ITEM.match(item) and items) and all(line[-1] not in _CLOSED for line in items)


def _pairs(text: str) -> list[Pair]:
    blocks = [block for block in _SEPARATOR.split(text) if block.strip()]
    if not blocks:
        raise Rejected("empty")
    labelled = any(_LABEL_INSIDE.search(block) or _ROLE.match(block) for block in blocks)
    turns = [_turn(block, labelled) for block in blocks]
    expected = ["question", "answer"] * ((len(turns) + 1) // 2)
    roles = [role for role, _ in turns]
    if len(roles) % 2:
        raise (
            Rejected("cut", "the last question has no answer")
            if roles[-1] == "question"
            else Rejected("roles_swapped", ", ".join(roles))
        )
    if roles != expected:
        raise Rejected("roles_swapped", ", ".join(roles[:8]))
    return [Pair(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]


def _turn(block: str, labelled: bool) -> tuple[str, str]:
    """Role and words of a block; `labelled` tells whether any block has a label."""
    label = _ROLE.match(block)
    if label is None:
        raise Rejected("text_around" if labelled else "missing_separator", block.strip()[:80])
    role = "question" if label[1].lower().startswith("q") else "answer"
    body = block[label.end() :].strip()
    if _LABEL_INSIDE.search(body):
        raise Rejected("missing_separator", body[:80])
    if not body:
        raise Rejected(f"empty_{role}")
    return role, body
