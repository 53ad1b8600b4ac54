"""Quality rules: small named functions that say why a parsed answer must not be trained on.

Each returns what it found, or None. They judge words against the symbolic context alone, and they
are cautious: what a caption could support is never called a contradiction.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import Pair

Rule = Callable[[Kind, Sequence[Pair], Context], str | None]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
           "twelve")  # fmt: skip
_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "mouse": "mice",
    "scissors": "scissors",
}
_SYNONYMS = {
    "person": "man men woman women boy girl child children kid people player rider group crowd family couple",
    "dining table": "table desk counter",
    "couch": "sofa",
    "tv": "television screen monitor",
    "cell phone": "phone smartphone",
    "potted plant": "plant flower pot",
    "airplane": "plane jet aircraft",
    "motorcycle": "motorbike bike",
    "bicycle": "bike",
}
_CAPTION = re.compile(
    r"\b(?:(?:according to|based on|as (?:stated|described|mentioned|noted) (?:in|by)|from|in|given) the "
    r"(?:provided |given )?(?:captions?|sentences|descriptions? provided)|"
    r"the (?:provided |given |first |second |third |fourth |fifth |image |five )?captions? "
    r"(?:say|says|state|states|mention|mentions|describe|describes|indicate|indicates|suggest|suggests)|"
    r"(?:provided|given) (?:captions?|descriptions?))\b",
    re.IGNORECASE,
)
_BOX = re.compile(r"\b(?:bounding[ -]?box(?:es)?|bbox(?:es)?|(?:box )?coordinates?)\b", re.IGNORECASE)
_COORDINATES = re.compile(r"[\[(]\s*\d?\.\d+\s*,\s*\d?\.\d+|\b0\.\d{3}\b|\b[xy][12]\s*=")
_REFUSAL = re.compile(
    r"\bas an (?:ai|artificial intelligence)\b|\bas a (?:large )?language model\b|"
    r"\bi(?:'m| am) (?:very |so )?sorry,? (?:but )?i\b|"
    r"\bi(?:'m| am) unable to (?:see|view|help|assist|provide)\b|"
    r"\bi (?:cannot|can't|can not|could not) (?:see|view|access|assist|help|fulfil|fulfill|comply|"
    r"provide|answer|describe|generate|create)\b|"
    r"\bi do(?: not|n't) have (?:access to|the ability)\b",
    re.IGNORECASE,
)
_NOT_IMAGE = re.compile(
    r"\b(?:no image (?:was|is|has been) (?:provided|given|attached)|"
    r"(?:provide|upload|share|attach) (?:an|the|your) image|"
    r"without (?:seeing|access to) the (?:image|photo|picture)|(?:cannot|can't|unable to) "
    r"(?:see|view|open) (?:the|any|your) (?:image|photo|picture)s?)\b",
    re.IGNORECASE,
)
_LEAST_WORDS = {"conversation": 1, "detail": 15, "reasoning": 12}
_REPEATS = 4
"""A phrase that comes so often without a pause is a loop."""
_LONG_ANSWER = 80
"""Characters; two pictures do not share an answer of this length by chance."""


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.question, pair.answer)]


def _find(pattern: re.Pattern[str], texts: Sequence[str]) -> str | None:
    for text in texts:
        if found := pattern.search(text.replace("\u2019", "'")):
            return found.group()
    return None


def mentions_caption(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Speaks of the captions as its source; a writing *in* the picture may have a caption."""
    return _find(_CAPTION, _texts(pairs))


def mentions_bounding_box(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Speaks of boxes or coordinates."""
    return _find(_BOX, _texts(pairs))


def leaks_coordinates(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Has the numbers of a box in its text."""
    return _find(_COORDINATES, _texts(pairs))


def refuses(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Declines to answer, or speaks of itself as a language model."""
    return _find(_REFUSAL, [pair.answer for pair in pairs])


def not_about_image(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Says that there is no image to see."""
    return _find(_NOT_IMAGE, [pair.answer for pair in pairs])


def too_short(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Fewer words than its kind of answer can do with; a scene of few objects needs fewer."""
    least = _LEAST_WORDS[kind]
    if kind == "detail":
        least = min(least, 5 + 5 * len(context.instances)) if context.instances else 5
    shortest = min(len(pair.answer.split()) for pair in pairs)
    return f"{shortest} words" if shortest < least else None


def repeats(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """A loop: the same few words again and again, the same long sentence thrice, or one question twice."""
    for pair in pairs:
        if found := _loop(pair.answer.lower().split()):
            return found
        sentences = Counter(s.strip().lower() for s in re.split(r"[.!?\n]+", pair.answer))
        for sentence, count in sentences.items():
            if count > 2 and len(sentence.split()) > 3:
                return sentence
    asked = Counter(_normal(pair.question) for pair in pairs if pair.question)
    return next((question for question, count in asked.items() if count > 1), None)


def _loop(words: list[str]) -> str | None:
    for size in range(1, 9):
        run = 0
        for at in range(size, len(words)):
            run = run + 1 if words[at] == words[at - size] else 0
            if run >= size * (_REPEATS - 1):
                return " ".join(words[at - size + 1 : at + 1])
    return None


def plural(noun: str) -> str:
    """The plural of an English noun, as far as names of categories need it."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def _counts(context: Context) -> Counter[str]:
    return Counter(instance.category.lower() for instance in context.instances)


def contradicts_count(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Says "there are N things" of a category that has another number of boxes.

    Only claims about all of the picture count: "there is/are", and answers to "how many". More
    than six are left alone, since annotators stop counting; so is a number that a caption supports.
    """
    captions = " ".join(context.captions).lower()
    for category, present in _counts(context).items():
        if present > 6:
            continue
        names = f"(?:{re.escape(category)}|{re.escape(plural(category))})"
        claim = re.compile(
            rf"\bthere (?:is|are) (?:only |exactly |just |a total of )?(\w+) {names}\b(?! \w+ing\b)"
        )
        for pair in pairs:
            heads = [m.group(1) for m in claim.finditer(pair.answer.lower())]
            if re.match(
                rf"how many {re.escape(plural(category))} (?:are|can|do)\b.{{0,25}}$", pair.question.lower()
            ):
                heads += re.findall(rf"\b(\w+) {names}\b", pair.answer.lower())[:1]
            for word in heads:
                claimed = _value(word)
                if claimed is None or claimed == present or _supported(claimed, category, captions):
                    continue
                return f"{word} {category} where {present} are marked"
    return None


def _value(word: str) -> int | None:
    if word in NUMBERS:
        return NUMBERS.index(word)
    return int(word) if word.isascii() and word.isdigit() and len(word) < 4 else None


def _supported(claimed: int, category: str, captions: str) -> bool:
    """Whether a caption has the claimed number, or one of the category where one is claimed."""
    word = NUMBERS[claimed] if claimed < len(NUMBERS) else str(claimed)
    if re.search(rf"\b(?:{word}|{claimed})\b", captions):
        return True
    names = [category, *_SYNONYMS.get(category, "").split()]
    alone = any(
        re.search(rf"\b(?:an?|the|single)(?: \w+){{0,3}} {re.escape(name)}\b", captions) for name in names
    )
    pair = any(re.search(rf"\b(?:couple|pair)\b.*\b{re.escape(name)}", captions) for name in names)
    return (claimed == 1 and alone) or (claimed == 2 and pair)


_ASKS_EXISTENCE = re.compile(
    r"^(?:is|are) there (?:an?|any) ([a-z ]+?)(?: (?:visible|present))?(?: in the \w+)?\?$"
)


def contradicts_category(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Says no to "is there a ...?" of a marked category, or denies it outright.

    That something is there without a box is no contradiction: COCO has 80 categories only.
    """
    marked = {form: c for c in _counts(context) for form in (c, plural(c))}
    for pair in pairs:
        answer = pair.answer.lower()
        asked = _ASKS_EXISTENCE.match(pair.question.lower().strip())
        if asked and asked.group(1) in marked and re.match(r"no\b", answer):
            return f"{asked.group(1)} is marked"
        for form in marked:
            where = r"(?:in the (?:image|photo|picture|scene)|visible|present)\b"
            denied = rf"\bthere (?:is|are) no {re.escape(form)} {where}"
            if re.search(denied, answer):
                return f"{form} is marked"
    return None


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        refuses,
        not_about_image,
        mentions_caption,
        mentions_bounding_box,
        leaks_coordinates,
        too_short,
        repeats,
        contradicts_count,
        contradicts_category,
    )
}
"""All rules in the order in which they are asked."""


def check(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """The name of the first rule that `pairs` break, or None."""
    return next((name for name, rule in RULES.items() if rule(kind, pairs, context)), None)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "backslashreplace")).digest()[:16]


class Duplicates:
    """Remembers 16 bytes for each answer, and finds those that come again."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def add(self, pairs: Sequence[Pair], image: str) -> bool:
        """Whether `pairs` are new; then they are remembered.

        Not new: the same questions and answers about the same image, or a long answer that was given
        before, whatever the image. Case, spaces and punctuation do not count.
        """
        own = "\n".join(f"{_normal(pair.question)}\t{_normal(pair.answer)}" for pair in pairs)
        keys = {_digest("pairs", image, own)}
        keys |= {_digest("answer", _normal(p.answer)) for p in pairs if len(p.answer) >= _LONG_ANSWER}
        if self._seen & keys:
            return False
        self._seen |= keys
        return True
