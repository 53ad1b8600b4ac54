"""Rules that a teacher's samples must keep: each a small function that says what is wrong, or nothing.

They look for what makes a sample teach something false: words that betray that the teacher saw text and no
picture, refusals, and claims that the context contradicts. A rule speaks up only where it is sure.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import Pair

Rule = Callable[[Kind, Sequence[Pair], Context], bool]

_CAPTION = re.compile(r"\bcaptions?\b", re.IGNORECASE)
_SENTENCES = re.compile(
    r"\b(?:as|given|provided|mentioned|described|stated|listed) (?:in|by) the "
    r"(?:sentences?|descriptions?|text|list|context|annotations?)\b"
    r"|\b(?:provided|given) (?:sentences?|descriptions?|annotations?|information|context)\b",
    re.IGNORECASE,
)
_BOX = re.compile(r"\b(?:bounding[ -]?box(?:es)?|bbox(?:es)?|coordinates?)\b", re.IGNORECASE)
_NUMBER = r"(?:0?\.\d{2,}|[01]\.\d{2,}|1\.0+)"
_COORDINATES = re.compile(rf"[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}|\b[xy][12]?\s*=\s*{_NUMBER}")
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|language|text)\b.{0,30}\b(?:model|assistant|intelligence)\b"
    r"|\bI(?:'m| am) (?:sorry|afraid|unable)\b|\bI apologi[sz]e\b"
    r"|\bI (?:can(?:no|'|\u2019)t|do not|don't|don\u2019t) "
    r"(?:see|view|have access|assist|help|provide|fulfil|comply|actually see)\b",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[a-z0-9']+")
_MIN_WORDS: dict[Kind, int] = {"conversation": 1, "detail": 8, "reasoning": 8}
_NUMBERS = {
    "no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "mouse": "mice", "knife": "knives",
              "sheep": "sheep", "skis": "skis", "scissors": "scissors"}  # fmt: skip
_LONG_ANSWER = 80
"""Characters from which on an answer that is the same for two images must be a canned one."""


def _texts(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        yield pair.question
        yield pair.answer


def mentions_caption(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Speaks of captions or of given sentences, unless the context itself does ("a page with a caption")."""
    about_captions = any(_CAPTION.search(caption) for caption in context.captions)
    return any(
        (not about_captions and _CAPTION.search(text)) or _SENTENCES.search(text) for text in _texts(pairs)
    )


def mentions_bounding_box(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Speaks of boxes or coordinates."""
    known = " ".join(context.captions)
    return any(_BOX.search(text) for text in _texts(pairs)) and not _BOX.search(known)


def leaks_coordinates(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Gives a place in numbers."""
    return any(_COORDINATES.search(text) for text in _texts(pairs))


def refuses(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Apologises, speaks as a language model, or says that it cannot see."""
    return any(is_refusal(pair.answer) for pair in pairs)


def is_refusal(text: str) -> bool:
    """Whether the teacher apologises, speaks as a language model, or says that it cannot see."""
    return bool(_REFUSAL.search(text))


def too_short(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """An answer with fewer words than its kind needs."""
    return any(len(pair.answer.split()) < _MIN_WORDS[kind] for pair in pairs)


def not_a_question(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """A question without a single word, or as long as an essay."""
    return any(not re.search(r"\w", pair.question) or len(pair.question) > 1000 for pair in pairs)


def repeats_itself(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """The same question twice, or an answer that goes round in circles."""
    questions = [" ".join(_WORDS.findall(pair.question.lower())) for pair in pairs]
    if len(set(questions)) < len(questions):
        return True
    return any(_loops(pair.answer) for pair in pairs)


def _loops(text: str) -> bool:
    words = _WORDS.findall(text.lower())
    runs = Counter(tuple(words[i : i + 6]) for i in range(len(words) - 5))
    return bool(runs) and runs.most_common(1)[0][1] >= 4


def contradicts_count(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Says "there are N dogs" where the boxes and the captions know of another number of dogs.

    Boxes do not list every object of a crowd, so a larger number than theirs is let pass unless the boxes
    are few; a number that a caption gives is let pass, too.
    """
    counts = Counter(instance.category.lower() for instance in context.instances)
    said_before = " ".join(context.captions).lower()
    for category, count in counts.items():
        for said in _claimed_counts(pairs, category):
            known = {count, *_counts_in(said_before, category)}
            if said not in known and (said < count or count <= 3) and count <= 12:
                return True
    return False


def _claimed_counts(pairs: Sequence[Pair], category: str) -> Iterator[int]:
    """Numbers of `category` that answers claim for the whole picture."""
    names = _name_pattern(category)
    words = "|".join(_NUMBERS)
    there = re.compile(
        rf"\bthere (?:is|are) (?:exactly |only |a total of |just )?({words}|\d{{1,2}}) {names}\b"
        r"(?=\s+(?:in (?:the|this) (?:picture|image|photo|scene)|in total|altogether|visible)|\s*[.!]|$)",
        re.IGNORECASE,
    )
    for pair in pairs:
        for found in there.finditer(pair.answer):
            yield _value(found[1])
        asked = re.match(rf"how many {names} (?:are|is|can)\b(.*)", pair.question.strip(), re.IGNORECASE)
        if asked and not re.search(r"\b(?:wear|with|on|hold|behind|in front|near|sit|stand|rid)", asked[1]):
            bare = re.match(rf"({words}|\d{{1,2}})\b[.!]?\s*$", pair.answer.strip(), re.IGNORECASE)
            if bare:
                yield _value(bare[1])


def _counts_in(text: str, category: str) -> set[int]:
    words = "|".join(_NUMBERS)
    found = re.finditer(rf"\b({words}|\d{{1,2}}) (?:\w+ ){{0,2}}{_name_pattern(category)}\b", text)
    return {_value(each[1]) for each in found}


def _value(word: str) -> int:
    return int(word) if word.isdigit() else _NUMBERS[word.lower()]


def _name_pattern(category: str) -> str:
    head, _, last = category.lower().rpartition(" ")
    plural = _IRREGULAR.get(last, last + ("es" if last.endswith(("s", "sh", "ch", "x")) else "s"))
    lead = re.escape(head) + " " if head else ""
    return rf"{lead}(?:{re.escape(last)}|{re.escape(plural)})"


def contradicts_category(kind: Kind, pairs: Sequence[Pair], context: Context) -> bool:
    """Denies that something is there that has a box or is in every caption ("Is there a dog?" - "No")."""
    known = {instance.category.lower() for instance in context.instances}
    for pair in pairs:
        asked = re.match(
            r"(?:is there|are there|can you see) (?:an?|any|some) ([a-z][a-z ]*?)"
            r"(?: in (?:the|this) (?:picture|image|photo|scene))?\s*\?",
            pair.question.strip().lower(),
        )
        if asked and re.match(r"no\b", pair.answer.strip().lower()):
            for category in known:
                if re.fullmatch(_name_pattern(category), asked[1]):
                    return True
    return False


RULES: dict[str, Rule] = {
    "refuses": refuses,
    "mentions_caption": mentions_caption,
    "mentions_bounding_box": mentions_bounding_box,
    "leaks_coordinates": leaks_coordinates,
    "not_a_question": not_a_question,
    "too_short": too_short,
    "repeats_itself": repeats_itself,
    "contradicts_count": contradicts_count,
    "contradicts_category": contradicts_category,
}
"""In the order in which they are asked; the name is the reason that a reject is kept with."""


def check(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """The name of the first rule that `pairs` break; None if they keep them all."""
    # The question of a detailed description is ours.
    return next((name for name, broken in RULES.items() if broken(kind, pairs, context)), None)


class Duplicates:
    """Knows what has been accepted.

    Args:
        across_images: whether a long answer that came with another image counts. The symbolic teacher's
            small world has the same truth to tell about many images.
    """

    def __init__(self, across_images: bool = True) -> None:
        self._across_images = across_images
        self._seen: set[bytes] = set()

    def add(self, pairs: Sequence[Pair], image: str) -> bool:
        """Takes a sample in; False if it has come before.

        Before means: the same questions and answers about the same image, or, word for word, the same
        long answers about any image.
        """
        answers = " ".join(" ".join(_WORDS.findall(pair.answer.lower())) for pair in pairs)
        questions = " ".join(" ".join(_WORDS.findall(pair.question.lower())) for pair in pairs)
        canned = self._across_images and len(answers) >= _LONG_ANSWER
        key = answers if canned else f"{image}\0{questions}\0{answers}"
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True
