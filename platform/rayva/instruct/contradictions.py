"""Rules on what a teacher's samples say against the boxes of their context: counts, and what is there.

A claim is called a contradiction only where it is about all of the picture, the boxes are sure to count it,
and no caption could support it. Everything else is let pass: a good sample that is thrown away costs money,
too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import Pair

_NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_NOTHING = ("zero", "none")
_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "mouse": "mice", "knife": "knives", "sheep": "sheep",
    "skis": "skis", "scissors": "scissors",
}  # fmt: skip
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
"""Other words of captions for categories of COCO."""
_MOST_COUNTED = 6
"""Annotators stop counting: above so many boxes a number says nothing."""
_GROUPED = frozenset(
    {
        "apple", "banana", "book", "broccoli", "cake", "carrot", "donut", "orange", "pizza", "sandwich",
        "scissors", "skis",
    }
)  # fmt: skip
"""What annotators box in bunches, rows, pairs or pieces: their boxes do not count it."""
_MANY = r"\b(?:bunch|crowd(?:ed)?|dozens?|flock|herd|lots?|many|numerous|piles?|rows?|stacks?|swarm)\b"
"""Words of captions that mean more than anybody has counted."""

_IMAGE = r"(?:picture|image|photo|photograph|scene)"
_IN_IMAGE = rf"(?: (?:in|on) (?:the|this) {_IMAGE})?"
_VISIBLE = r"(?: (?:visible|present|shown|here))?"
_STOP = r"(?=\s*(?:[.!;]|$))"
_PICKS_OUT = (
    r"(?:\w+ing|\w+ed|that|who|which|with|without|near|behind|beside|next|on|under|above|below|by|around|"
    r"between|upper|lower|also|each|already|still|to the|in (?:a|an|his|her|its|their))\b"
    r"|(?:in|at) (?:the )?(?:front|back|fore|left|right|top|bottom|middle|cent|distance|far|corner)"
)
"""What comes behind a noun that is not about all of its kind."""
_CLAIMED = (
    rf"\b(?!,? (?:{_PICKS_OUT}))"
    r"(?=\s*(?:$|[.,;:!?)]|(?:in|at|and|is|are|of|here|there|visible|present|shown|total)\b))"
)
"""What may come behind the noun of a claim; another noun makes it something else: "one dog house"."""
_CLAIMED_MORE = (
    r"\b(?=\s*(?:$|[.,;:!?)]|(?:in|at|on|and|is|are|of|near|next|beside|behind|under|with|who|that|here|there"
    r"|visible|present|shown|total|\w{2,}ing)\b))"
    r"(?![^.;!?]*\b(?:paint\w*|draw\w*|print\w*|pictured|posters?|signs?|screens?|monitors?|tv|televisions?"
    r"|reflect\w*|mirrors?|statues?|sculptures?|toys?|stuffed|shirts?|photos|pictures)\b)"
)
"""What may come behind the noun where more are claimed than there are: some cannot be more than all; but what
is in a painting or on a shirt need not have a box."""
_HEDGES = r"(?:about|around|approximately|roughly|nearly|almost|over|than|least|most|to|first|second)"
_ADDS = re.compile(r"\b(?:another|others?|more|second|third|also|additional|both|else|plus|besides|rest)\b")
_SUPPOSES = re.compile(
    r"\b(?:if|when(?:ever)?|where|unless|until|whether|suppos\w*|imagin\w*)\b", re.IGNORECASE
)
_ABOUT_ALL = (
    r"(?: (?:are|is|be|there|here|visible|present|shown|depicted|seen|counted|found|see|spot|count|find|"
    r"in total|altogether|can(?: you| we| one)?|do (?:you|we)|"
    rf"does (?:the|this) {_IMAGE} (?:show|have|contain)|in (?:the|this) {_IMAGE}))*\s*\?*\s*"
)
"""The rest of "how many dogs ...?" that asks for all of them."""


def contradicts_count(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Says "there are N dogs" where boxes and captions know of another number of dogs.

    Only claims about all of the picture count: "there are N", unless what follows picks some out ("on the
    left", "wearing hats"), and answers to "how many dogs are there?". Many boxes prove nothing, since
    annotators stop counting, nor do those beside a crowd or of what is boxed in bunches; and a number that a
    caption could support is let pass.
    """
    captions = " ".join(context.captions).lower()
    for category, present in _counted(context).items():
        for word in _claimed(pairs, category, present):
            value = _value(word)
            if value is not None and value != present and not _supported(value, present, category, captions):
                return f"{word} {category}, but {present} in the boxes"
    return None


def _counted(context: Context) -> dict[str, int]:
    """How many there are of the categories that the boxes count."""
    crowds = {category.lower() for category in context.crowds}
    counts = Counter(instance.category.lower() for instance in context.instances)
    return {
        category: present
        for category, present in counts.items()
        if present <= _MOST_COUNTED and category not in crowds | _GROUPED
    }


def _claimed(pairs: Sequence[Pair], category: str, present: int) -> Iterator[str]:
    """The words in the place of a number where an answer counts all of `category`."""
    names = _name_pattern(category)
    for pair in pairs:
        answer = pair.answer.lower()
        number_of = r"(?:how many|what(?: is|'s) the (?:total |exact )?(?:number|count) of)"
        asked = re.fullmatch(rf"{number_of} {names}{_ABOUT_ALL}", pair.question.strip(), re.IGNORECASE)
        yield from (word for word in _stated_more(answer, names) if (_value(word) or 0) > present)
        for word in (*_stated(answer, names), *(_answered(answer, names) if asked else ())):
            value = _value(word)
            # "There is one dog in the car, and another in front of it": what is added up is not counted here.
            if value is not None and (value > present or not _ADDS.search(answer)):
                yield word


def _stated(answer: str, names: str) -> Iterator[str]:
    """N in "there are N dogs"; that there are none is left to `contradicts_category`."""
    there = rf"\bthere (?:is|are) (?:exactly |only |a total of |just )?(\w+) {names}{_CLAIMED}"
    for found in re.finditer(there, answer):
        if found[1] != "no" and not _supposed(answer, found.start()):
            yield found[1]


def _stated_more(answer: str, names: str) -> Iterator[str]:
    """N where an answer says of the picture that it has N dogs, all or some: "three dogs lie on a couch"."""
    start = (
        r"(?:\bthere (?:is|are)"
        rf"|\b{_IMAGE} (?:features|shows|contains|depicts|has|displays|includes|captures)|\bscene with"
        rf"|\b(?:in|on) (?:the|this) {_IMAGE},?(?: (?:there are|(?:i|we|you) can see|(?:i|we|you) see))?"
        r"|\b(?:i|we) (?:can )?(?:see|count|spot))"
    )
    claim = rf"(\w+) {names}"
    counted = rf"{start} (?:exactly |only |a total of |just )?{claim}{_CLAIMED_MORE}"
    first = rf"\A(?:the )?{claim} (?:is|are) \w+ing\b"
    for found in (*re.finditer(counted, answer), *re.finditer(first, answer)):
        if not _supposed(answer, found.start()):
            yield found[1]


def _answered(answer: str, names: str) -> Iterator[str]:
    """N in an answer to "how many dogs are there?": alone, in "there are N", or in its only "N dogs"."""
    start = r"(?:there (?:is|are) )?(?:exactly |only |just )?"
    if bare := re.match(rf"{start}(\w+)\s*(?:$|[.!:,])", answer.strip()):
        yield bare[1]
        return
    # "so" gives the first word, too, one before it.
    found = list(re.finditer(rf"\b(\w+) (\w+) {names}{_CLAIMED}", f"so {answer}"))
    if len(found) == 1 and not re.fullmatch(_HEDGES, found[0][1]):
        yield found[0][2]


def _supposed(text: str, at: int) -> bool:
    """Whether the sentence at this place supposes something: "if there are no cars, ..."."""
    return _SUPPOSES.search(re.split(r"[.!?]", text[:at])[-1]) is not None


def _value(word: str) -> int | None:
    if word in _NOTHING:
        return 0
    if word in _NUMBERS:
        return _NUMBERS.index(word)
    return int(word) if word.isascii() and word.isdigit() and len(word) < 4 else None


def _supported(claimed: int, present: int, category: str, captions: str) -> bool:
    """Whether a caption has the number, or speaks of one or two of the category, or of more than boxes."""
    word = _NUMBERS[claimed] if claimed < len(_NUMBERS) else str(claimed)
    if claimed and re.search(rf"\b(?:{word}|{claimed})\b", captions):
        return True
    every = [_name_pattern(name) for name in (category, *_SYNONYMS.get(category, "").split())]
    names = rf"(?:{'|'.join(every)})"
    if claimed == 1:
        return re.search(rf"\b(?:an?|the|single)(?: \w+){{0,3}} {names}\b", captions) is not None
    two = rf"\b(?:couple|pair|both)\b.*\b{names}\b|\b{names}\b.{{0,40}}\b(?:and|with)\b.{{0,40}}\b{names}\b"
    if claimed == 2 and re.search(two, captions):
        return True
    if claimed <= present:
        return False
    several = re.escape(plural(category))
    told = rf"\b(?:{'|'.join(_NUMBERS[2:])}|\d+) (?:\w+ )?{several}\b"
    if present == 1 and re.search(rf"\b{several}\b", captions) and not re.search(told, captions):
        return True
    return re.search(rf"{_MANY}.*\b{names}\b", captions) is not None


def _name_pattern(category: str) -> str:
    return rf"(?:{re.escape(category.lower())}|{re.escape(plural(category.lower()))})"


def plural(noun: str) -> str:
    """The plural of an English noun, as far as names of categories need it."""
    if noun.startswith("pair of "):
        return "pairs" + noun.removeprefix("pair")
    head, space, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        return f"{head}{space}{_IRREGULAR[last]}"
    if re.search(r"[^aeiou]y$", last):
        return f"{noun[:-1]}ies"
    return noun + ("es" if last.endswith(("s", "sh", "ch", "x")) else "s")


_ANY = r"(?:(?:an?|any|some) )?"
_ASKS_EXISTENCE = re.compile(
    rf"(?:is there|are there|(?:can|do) (?:you|we) see|does (?:the|this) {_IMAGE} (?:show|contain|have)) "
    rf"{_ANY}([a-z][a-z ]*?){_VISIBLE}{_IN_IMAGE}\s*\?",
    re.IGNORECASE,
)
_ASKS_PRESENCE = re.compile(
    rf"(?:is|are) {_ANY}([a-z][a-z ]*?)"
    rf"(?: (?:visible|present|shown){_IN_IMAGE}| in (?:the|this) {_IMAGE})\s*\?",
    re.IGNORECASE,
)
_NO = re.compile(
    r"(?:no|none|nope)\b|there (?:is|are)(?:n't| not) any\b|there are none\b|i (?:do not|don't) see any\b",
    re.IGNORECASE,
)
_ONLY_ONE = re.compile(r"\b(?:only|just|exactly) (?:one|an?)\b|\bsingle\b", re.IGNORECASE)


def contradicts_category(kind: Kind, pairs: Sequence[Pair], context: Context) -> str | None:
    """Denies that something is there that has a box: "Is there a dog?" - "No", or "there are no dogs".

    That something is there without a box is no contradiction: COCO has 80 categories only. Nor is it one to
    say that there are none in some place, or no more than one.
    """
    captions = " ".join(context.captions).lower()
    boxed = (instance.category for instance in context.instances)
    for category in sorted({name.lower() for name in (*boxed, *context.crowds)}):
        if re.search(rf"\b(?:no|without(?: any)?) {_name_pattern(category)}\b", captions):
            continue
        if any(_denied(pair, category) or _said_absent(pair.answer, category) for pair in pairs):
            return f"{category} has a box"
    return None


def _denied(pair: Pair, category: str) -> bool:
    """Whether the answer is "no" to a question whether there are any of `category` at all."""
    question, answer = pair.question.strip(), pair.answer.strip().replace("\u2019", "'")
    asked = _ASKS_EXISTENCE.match(question) or _ASKS_PRESENCE.match(question)
    names = _name_pattern(category)
    if asked is None or not re.fullmatch(names, asked[1], re.IGNORECASE) or not _NO.match(answer):
        return False
    # "Are there dogs?" - "No, only one." - "No, there are none but the dog on the sign."
    if asked[1].lower() != category and _ONLY_ONE.search(answer):
        return False
    return not re.search(rf"\b(?:but|except|apart from)\b.*\b{names}\b", answer, re.IGNORECASE)


def _said_absent(answer: str, category: str) -> bool:
    """Whether the answer says on its own that there are none of `category` in the picture."""
    names = _name_pattern(category)
    text = answer.lower().replace("\u2019", "'")
    # "..., only a couch"; but not "only one", and not "only a small dog".
    instead = rf"(?=, (?:only|just) (?!(?:one|the|its|his|her|their)\b|an?(?: \w+)? {names}))"
    end = rf"{_VISIBLE}{_IN_IMAGE}(?:{_STOP}|{instead})"
    absent = (
        rf"\bthere (?:is|are)(?: no|(?:n't| not) (?:an?|any)) {names}{end}"
        rf"|\bno {names} (?:is|are|can be) (?:visible|present|shown|seen){_IN_IMAGE}(?:{_STOP}|{instead})"
        rf"|\b{_IMAGE} (?:(?:does not|doesn't) (?:contain|show|have|include|feature|depict) (?:an?|any)"
        rf"|(?:contains|shows|has|includes|features|depicts) no) {names}{_VISIBLE}(?:{_STOP}|{instead})"
        rf"|\bi (?:do not|don't|cannot|can't) see (?:an?|any) {names}{end}"
    )
    return any(not _supposed(text, found.start()) for found in re.finditer(absent, text))
