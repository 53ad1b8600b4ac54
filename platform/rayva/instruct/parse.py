"""Reads a teacher's raw answer: question and answer pairs, or a documented reason why not.

Conversations and complex reasoning are blocks `Question:` / `Answer:` with a line of `===` between
them; a detailed description is the bare answer. Harmless variation (spaces, case, numbers, markdown
around a label, CRLF, a code fence around the whole) is read over; what could mix up words and roles
is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayva.instruct.contexts import Kind
from rayva.text.instructions import DETAILED, choose_instruction

REASONS: dict[str, str] = {
    "empty": "the answer has no text",
    "cut": "the answer stops before its end",
    "filtered": "the endpoint held text back (finish reason content_filter)",
    "bad_characters": "control characters or broken Unicode",
    "special_token": "a token with a meaning of its own in training, such as <image>",
    "wrong_format": "no `Question:` and `Answer:` labels, or some in a bare description",
    "missing_separator": "a label without a line of === in front of it",
    "text_outside": "words under no label",
    "roles_swapped": "an answer comes before its question, or two of a kind in a row",
    "empty_question": "a question without words",
    "empty_answer": "an answer without words",
    "wrong_count": "complex reasoning has not exactly one pair",
}
"""Every reason that `parse` gives."""

_LABEL = re.compile(r"^[\s#*_>-]*(question|answer)[ \t]*#?\d*[\s*_]*[:\uff1a][\s*_]*(.*)$", re.IGNORECASE)
_SEPARATOR = re.compile(r"^[\s*_]*={3,}[\s*_]*$")
_SPECIAL = re.compile(r"<image>|</?s>|<\|[a-z_]+\|>|<im_(?:start|end|patch)>|\[/?INST\]", re.IGNORECASE)
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")
_OPEN_END = re.compile(
    r"(?:[,;(\-\u2013\u2014]|\b(?:a|an|the|of|and|or|with|in|on|at|to|from|by|for|is|are|its|their|this|that))$",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s")
_CLOSED = ".!?:)]}\"'\u2019\u201d\u2026*`_\u3002\uff01\uff1f"
_LONG = 8
"""An answer of so many words is a sentence, and sentences end in a full stop."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with its answer; a detailed description's question is empty until one is drawn."""

    question: str
    answer: str


class Rejected(Exception):
    """An answer that is not used: a `reason` of `REASONS`, and what in it was at fault."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def detail_question(context_id: str, seed: int) -> str:
    """One of the 16 requests for a detailed description, the same for the same image and seed."""
    return choose_instruction(DETAILED, seed, context_id)


def parse(kind: Kind, text: str | None, finish_reason: str | None = None) -> list[Pair]:
    """The pairs of a teacher's answer.

    Raises:
        Rejected: the answer cannot be used.
    """
    if finish_reason == "length":
        raise Rejected("cut", "the token limit was reached")
    if finish_reason == "content_filter":
        raise Rejected("filtered")
    text = _clean(text or "")
    pairs = [Pair("", _bare(text))] if kind == "detail" else _pairs(_blocks(text))
    if kind == "reasoning" and len(pairs) != 1:
        raise Rejected("wrong_count", f"{len(pairs)} pairs")
    _check_end(pairs[-1].answer, finish_reason)
    return pairs


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\u200b", "").strip()
    lines = text.split("\n")
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        text = "\n".join(lines[1:-1]).strip()
    if not text:
        raise Rejected("empty")
    if found := _BROKEN.search(text):
        raise Rejected("bad_characters", f"U+{ord(found.group()):04X} at {found.start()}")
    if found := _SPECIAL.search(text):
        raise Rejected("special_token", found.group())
    return text


def _bare(text: str) -> str:
    lines = text.split("\n")
    label = _LABEL.match(lines[0])
    if label and label.group(1).lower() == "answer":
        lines[0] = label.group(2)
    for line in lines:
        if _LABEL.match(line) or _SEPARATOR.match(line):
            raise Rejected("wrong_format", f"a description with the line {line[:60]!r}")
    answer = "\n".join(lines).strip()
    if not _has_words(answer):
        raise Rejected("empty_answer")
    return answer


def _blocks(text: str) -> list[tuple[str, str]]:
    """(label in lower case, words) of each block between separators."""
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _SEPARATOR.match(line):
            parts.append([])
        else:
            parts[-1].append(line)
    contents = [part for part in parts if any(line.strip() for line in part)]
    if not any(_LABEL.match(line) for part in contents for line in part):
        raise Rejected("wrong_format", "no labels")
    return [_block("\n".join(part).strip().split("\n")) for part in contents]


def _block(lines: list[str]) -> tuple[str, str]:
    label = _LABEL.match(lines[0])
    if any(_LABEL.match(line) for line in lines[1:]):
        raise Rejected("missing_separator" if label else "text_outside", lines[0][:60])
    if not label:
        raise Rejected("text_outside", lines[0][:60])
    return label.group(1).lower(), "\n".join([label.group(2), *lines[1:]]).strip()


def _pairs(blocks: list[tuple[str, str]]) -> list[Pair]:
    for number, (role, _) in enumerate(blocks):
        if role != ("question", "answer")[number % 2]:
            raise Rejected("roles_swapped", f"block {number + 1} is labelled {role}")
    if len(blocks) % 2:
        raise Rejected("cut", "the last question has no answer")
    words = [text for _, text in blocks]
    return [_pair(q, a) for q, a in zip(words[::2], words[1::2], strict=True)]


def _pair(question: str, answer: str) -> Pair:
    if not _has_words(question):
        raise Rejected("empty_question")
    if not _has_words(answer):
        raise Rejected("empty_answer", question[:60])
    if answer.endswith("?") and question.endswith("."):
        raise Rejected("roles_swapped", question[:60])
    return Pair(question, answer)


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _check_end(answer: str, finish_reason: str | None) -> None:
    """A cut answer is also seen by its open end, since not every endpoint says why it stopped."""
    if answer[-1] in _CLOSED:
        return
    last_line = answer.rsplit("\n", 1)[-1]
    unfinished = len(answer.split()) >= _LONG and not (
        finish_reason == "stop" and _LIST_ITEM.match(last_line)
    )
    if unfinished or _OPEN_END.search(answer):
        raise Rejected("cut", f"ends in {answer[-40:]!r}")
