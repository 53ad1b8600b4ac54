"""Rules that a teacher's samples must keep: each a small function that says what is wrong, or nothing.

They look for what makes a sample teach something false: words that betray that the teacher saw text and no
picture, refusals, and claims that the context contradicts. A rule speaks up only where it is sure: what a
caption could support is never called a contradiction.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.contradictions import contradicts_category, contradicts_count
from rayva.instruct.nonsense import nonsense
from rayva.instruct.parse import Pair

Rule = Callable[[Kind, Sequence[Pair], Context], str | None]
"""What it found, in the teacher's words or ours; None where the rule is kept."""

_CAPTION = re.compile(r"\bcaptions?\b", re.IGNORECASE)
_SENTENCES = re.compile(
    r"\b(?:as|given|provided|mentioned|described|stated|listed) (?:in|by) the "
    r"(?:sentences?|descriptions?|text|list|context|annotations?)\b"
    r"|\b(?:provided|given) (?:sentences?|descriptions?|annotations?|context)\b"
    r"|\b(?:the|this|from|on) (?:provided|given) information\b(?! (?:at|by|for|on)\b)"
    r"|\b(?:sentences?|descriptions?|annotations?|information|context) (?:provided|given)\b"
    # Information is also given by signs, for tourists and at a desk; but not about "this image".
    r"(?! (?:by|for|to|at|on|in|with)\b(?! (?:me\b|(?:the|this) (?:image|picture|photo|scene))))"
    r"|\b(?:based on|according to) the (?:sentences?|descriptions?|annotations?)\b(?! (?:on|in|of)\b)",
    re.IGNORECASE,
)
_SENTENCE_SAYS = re.compile(
    r"\bthe (?:(?:first|second|third|fourth|fifth|last|other|given) )?(?:sentence|description|annotation)s? "
    r"(?:also |only |do not |does not |don't |doesn't )?"
    r"(?:say|state|mention|describe|note|indicate|suggest|specify|specifie|tell)s?\b",
    re.IGNORECASE,
)
_WRITTEN = re.compile(
    r"\b(?:text|sentences?|descriptions?|annotations?|words?|writing|written|letters?|notes?|pages?|books?"
    r"|newspapers?|magazines?|menus?|signs?|posters?|labels?|screens?|monitors?)\b",
    re.IGNORECASE,
)
"""What there is to read in a picture: its sentences are not those of the prompt."""
_BOX = re.compile(
    r"\b(?:bounding[ -]?box(?:es)?|bbox(?:es)?"
    # "Coordinates" as a noun: "the players coordinate their movements" is about no box.
    r"|(?:the|these|those|its|their|given|provided|exact|\w+'s|[xy]|pixel|spatial|normali[sz]ed|image|box"
    r"|with|at|by|of|in|from|on) coordinates?\b"
    r"|coordinates (?=[\[(:\d]|(?:of|are|for|indicate|suggest|show|given|provided)\b))",
    re.IGNORECASE,
)
_NUMBER = r"(?:0?\.\d+|1\.0+)"
_MORE_NUMBERS = r"(?!\d|\s*%|,? (?:and|or) [\d$]| (?:\w+ )?(?:dollar|cent|euro|pound|met|lit|kilo|mile)\w*)"
"""Not behind a place: the numbers are prices or measures."""
_COORDINATES = re.compile(
    rf"[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}|\b[xy][12]?\s*=\s*{_NUMBER}|\b0\.\d{{3}}\b"
    rf"|\b(?:at|from|around|near|position) {_NUMBER}\s*,\s*{_NUMBER}{_MORE_NUMBERS}"
)
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|language|text)\b.{0,30}\b(?:model|assistant|intelligence)\b"
    r"|\bas an ai, i\b|\A\W*sorry, (?:but|i)\b|\bI apologi[sz]e\b"
    r"|\bI(?:'m| am) (?:very |so )?(?:sorry|afraid|unable|not (?:able|allowed|permitted) to)\b"
    r"|\bI (?:can(?:no|')t|can not|could not|do not|don't) "
    r"(?:actually )?(?:(?:see|view)(?! any\b(?! (?:image|picture|photo)))"
    r"|have (?:access|the ability)|access|assist|help|provide|fulfill?|comply"
    r"|(?:describe|discuss|analy[sz]e|process|identify) (?:an |the |this |these |such )?"
    r"(?:images?|pictures?|photos?|content|people|persons?|requests?))\b"
    r"|\bI (?:must|have to|need to)(?: \w+ly)? (?:decline|refuse)\b"
    r"|\bI(?:'m| am) an ai\b"
    r"|\bI (?:won't|will not) be able to (?:help|assist|describe|answer|provide|comply)\b"
    r"|\bI can(?:no|')t answer (?:that|this|your|the question|it)\b"
    r"|\b(?:this|your) request\b[^.\n]{0,80}"
    r"\b(?:violates|(?:must|has|needs?|is|was)\b.{0,15} (?:declined|refused|denied))\b"
    r"|\b(?:violat\w+|against) (?:our|my|the) (?:content|usage|use|safety) (?:polic(?:y|ies)|guidelines)\b",
    re.IGNORECASE,
)
_NO_IMAGE = re.compile(
    r"\bno (?:image|picture|photo) (?:was|is|has been) (?:provided|given|attached)\b"
    r"|\bwithout (?:seeing|access to) the (?:image|picture|photo)\b",
    re.IGNORECASE,
)
# People in a picture share their photos, too: only who is spoken to is asked for one, and for us.
_ASKS_FOR_IMAGE = re.compile(
    r"(?:\A|[.!?]\s+|\b(?:please|kindly|feel free to|if you|you to|(?:can|could|would|will) you"
    r"|you(?:'ll| will)? (?:need|have) to)\b[^.!?\n]{0,30}?\b)"
    r"(?:provide|upload|share|attach|send) (?:me |us )?(?:an?|the|your|another) (?:image|picture|photo)\b"
    r"(?! (?:online|(?:with|on|to) (?:an?|the|your|friends|family|others|people|social)\b))",
    re.IGNORECASE,
)
_ABOUT_OUR_TASK = r"[^\n]{0,100}\b(?:description|answer|question|conversation)s?\b[^\n]{0,60}:[ \t*]*\n"
_REPLY = re.compile(
    rf"\A\W*(?:sure|certainly|absolutely|of course|ok(?:ay)?)\b{_ABOUT_OUR_TASK}"
    rf"|\A\W*here(?: is|'s| are)\b{_ABOUT_OUR_TASK}"
    r"|\blet me know if (?:you|there|this)\b|\bI hope (?:this|that) helps\b",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[\w']+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")
"""A character of Thai, Lao, Japanese or Chinese, which are written without spaces between words."""
_MIN_WORDS: dict[Kind, int] = {"conversation": 1, "detail": 8, "reasoning": 8}
_LONG_ANSWER = 80
"""Characters from which on an answer that is the same for two images must be a canned one."""


def _texts(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        yield pair.question
        yield pair.answer


def _find(pattern: re.Pattern[str], texts: Iterator[str] | Sequence[str]) -> str | None:
    for text in texts:
        if found := pattern.search(text.replace("\u2019", "'")):
            return found[0]
    return None


def mentions_caption(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Speaks of captions or of given sentences, unless the context itself does ("a page with a caption")."""
    patterns = [_SENTENCES]
    if _find(_CAPTION, context.captions) is None:
        patterns.append(_CAPTION)
    if _find(_WRITTEN, (*context.captions, *(instance.category for instance in context.instances))) is None:
        patterns.append(_SENTENCE_SAYS)
    return next((found for pattern in patterns if (found := _find(pattern, _texts(pairs)))), None)


def mentions_bounding_box(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Speaks of boxes or coordinates."""
    return None if _find(_BOX, context.captions) else _find(_BOX, _texts(pairs))


def leaks_coordinates(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Gives a place in numbers."""
    return _find(_COORDINATES, _texts(pairs))


def refuses(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Apologises, speaks as a language model, or says that it cannot see."""
    return _find(_REFUSAL, [pair.answer for pair in pairs])


def is_refusal(text: str) -> bool:
    """Whether the teacher apologises, speaks as a language model, or says that it cannot see."""
    return _find(_REFUSAL, [text]) is not None


def misses_image(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Says that there is no image, or asks for one."""
    answers = [pair.answer for pair in pairs]
    return _find(_NO_IMAGE, answers) or _find(_ASKS_FOR_IMAGE, answers)


def replies_to_the_prompt(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Speaks to who wrote the prompt: "Sure! Here is a description:", "Let me know if you need more"."""
    return _find(_REPLY, [pair.answer for pair in pairs])


def too_short(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """An answer with fewer words than its kind needs."""
    fewest = min(_count_words(pair.answer) for pair in pairs)
    return f"{fewest} words" if fewest < _MIN_WORDS[kind] else None


def _count_words(text: str) -> int:
    """Words; where no spaces tell them apart, two characters are one."""
    return max(len(text.split()), len(_UNSPACED.findall(text)) // 2)


def not_a_question(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """A question without a single word, or as long as an essay; that of a description is ours."""
    for pair in pairs if kind != "detail" else ():
        if not re.search(r"\w", pair.question) or len(pair.question) > 1000:
            return pair.question[:80]
    return None


def repeats_itself(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """The same question twice, or an answer that goes round in circles."""
    questions = Counter(" ".join(_WORDS.findall(pair.question.lower())) for pair in pairs)
    twice = next((question for question, count in questions.items() if count > 1), None)
    return twice or next((found for pair in pairs if (found := _loop(pair.answer))), None)


def _loop(text: str) -> str | None:
    """Eight words that come four times, a few words four times on end, or a sentence thrice."""
    words = _WORDS.findall(text.lower())
    runs = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    if runs and runs.most_common(1)[0][1] >= 4:
        return " ".join(runs.most_common(1)[0][0])
    for size in range(2, 6):
        length = 0
        for at in range(size, len(words)):
            length = length + 1 if words[at] == words[at - size] else 0
            if length >= 3 * size:
                return " ".join(words[at - size + 1 : at + 1])
    sentences = Counter(sentence.strip().lower() for sentence in re.split(r"[.!?\n]+", text))
    return next((s for s, count in sentences.items() if count > 2 and len(s.split()) > 3), None)


RULES: dict[str, Rule] = {
    "refuses": refuses,
    "misses_image": misses_image,
    "replies_to_the_prompt": replies_to_the_prompt,
    "mentions_caption": mentions_caption,
    "mentions_bounding_box": mentions_bounding_box,
    "leaks_coordinates": leaks_coordinates,
    "nonsense": nonsense,
    "not_a_question": not_a_question,
    "too_short": too_short,
    "repeats_itself": repeats_itself,
    "contradicts_count": contradicts_count,
    "contradicts_category": contradicts_category,
}
"""In the order in which they are asked; the name is the reason that a reject is kept with."""


def find_fault(kind: Kind, pairs: Sequence[Pair], context: Context) -> tuple[str, str] | None:
    """The name of the first rule that `pairs` break, and what it found; None if they keep them all."""
    for name, rule in RULES.items():
        if (found := rule(kind, pairs, context)) is not None:
            return name, found
    return None


def check(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """The name of the first rule that `pairs` break; None if they keep them all."""
    fault = find_fault(kind, pairs, context)
    return fault[0] if fault else None


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
