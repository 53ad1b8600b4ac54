"""Which answers written as sentences can be graded without a judge, and by what.

A short answer is compared word by word. Of a longer one only the part that its question asks for counts,
where a rule finds it: yes or no, a number, or colours. Everything else is left to judges.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

Match = Literal["text", "yes_no", "number", "color"]
"""`text`: the whole answer but for case, punctuation and articles; the others: the part of that name."""

SHORT_ANSWER_WORDS = 5
"""Longer answers are not compared word by word: the same can be said in too many ways."""

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBERS = {word: number for number, word in enumerate(_WORDS)} | {"no": 0, "none": 0}
_COLORS = {
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "silver",
    "gold", "beige", "tan", "turquoise",
}  # fmt: skip
_SAME_COLOR = {"grey": "gray", "golden": "gold", "violet": "purple"}
_NUMBER = re.compile(rf"\b(?:\d+(?:,\d{{3}})*|{'|'.join(_NUMBERS)})\b", re.IGNORECASE)
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_ASKS_YES_NO = re.compile(
    r"(?:is|are|was|were|do|does|did|can|could|has|have|will|would|should)(?:n't)?\b(?!.*\bor\b)",
    re.IGNORECASE,
)
_ASKS_NUMBER = re.compile(r"how many\b|what (?:is|'s) the number of\b", re.IGNORECASE)
_ASKS_COLOR = re.compile(
    r"(?:what|which) colou?rs?\b|what (?:is|are|was|were) the colou?rs? of\b", re.IGNORECASE
)


def _yes_no(text: str) -> str | None:
    found = _YES_NO.match(text)
    return found[1].lower() if found else None


def _number(text: str) -> str | None:
    """The first number: who says "three people, two women and one man" counts three."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    word = found[0].lower()
    return str(_NUMBERS[word]) if word in _NUMBERS else str(int(word.replace(",", "")))


def _color(text: str) -> str | None:
    words = (_SAME_COLOR.get(word, word) for word in re.findall(r"[a-z]+", text.lower()))
    return " ".join(sorted(set(words) & _COLORS)) or None


_PARTS: dict[str, tuple[re.Pattern[str], Callable[[str], str | None]]] = {
    "yes_no": (_ASKS_YES_NO, _yes_no),
    "number": (_ASKS_NUMBER, _number),
    "color": (_ASKS_COLOR, _color),
}
assert {"text", *_PARTS} == set(get_args(Match))


def find_part(match: str, text: str) -> str | None:
    """The part of an answer that counts under `match` (not `text`), in one spelling; None without one."""
    return _PARTS[match][1](text)


def how_to_grade(question: str, answer: str) -> Match | None:
    """How answers to `question` are compared with `answer`; None where that takes a judge."""
    if 1 <= len(answer.split()) <= SHORT_ANSWER_WORDS:
        return "text"
    for match, (asks, part) in _PARTS.items():
        if asks.match(question.strip()) and part(answer) is not None:
            return match  # type: ignore[return-value]  # the keys are Match's, as asserted above
    return None
