"""A symbolic teacher: writes the paper's three response types from captions and boxes alone.

It stands where GPT-4 stands in the paper (section 3): it never sees the picture, only the symbolic
representation, and answers with conversations, detailed descriptions and complex reasoning. It
needs no network and is exact, so that a model trained on its words can be graded.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayva.data.places import PHRASES, place_name
from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Instance, Turn
from rayva.instruct.contexts import Context, Kind
from rayva.instruct.contradictions import plural

ResponseType = Literal["conversation", "detail", "complex"]

COLORS = [
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
    "grey",
    "silver",
    "golden",
]
COMMON_COLORS = COLORS[:6]
COMMON_SHAPES = ("circle", "square", "triangle", "star")
"""What is asked for when the answer is to be "no"."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LARGE_SIDE = 0.24
"""Boxes whose longer side exceeds this share of the picture are called large."""


@dataclass(frozen=True, slots=True)
class Thing:
    """What an instance tells about one object."""

    name: str
    noun: str
    color: str | None
    size: str
    x: float
    y: float
    box: tuple[float, float, float, float]

    @property
    def place(self) -> str:
        """Which ninth of the picture holds the centre, in words."""
        return place_name(self.x, self.y)


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question that the symbolic representation settles, with its short answer."""

    kind: str
    question: str
    answer: str


def _thing(instance: Instance) -> Thing:
    x1, y1, x2, y2 = instance.bbox
    first, _, rest = instance.category.partition(" ")
    color = first if rest and first in COLORS else None
    size = "large" if max(x2 - x1, y2 - y1) > LARGE_SIDE else "small"
    noun, name = rest if color else instance.category, instance.category
    if noun.endswith("s") and plural(noun) == noun:
        noun = name = f"pair of {noun}"
    return Thing(name, noun, color, size, (x1 + x2) / 2, (y1 + y2) / 2, instance.bbox)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def _unique(things: list[Thing], key: Callable[[Thing], str | None]) -> list[Thing]:
    counts = Counter(key(t) for t in things)
    return [t for t in things if key(t) is not None and counts[key(t)] == 1]


def _named(things: list[Thing]) -> list[Thing]:
    """The things that their names tell from all others."""
    return _unique(things, lambda t: t.name)


def _ask_color(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    """By what the object is, or by where it is."""
    asked = [(t, t.noun) for t in _unique(things, lambda t: t.noun) if t.color]
    if rng.random() < 0.5:
        asked = [(t, f"object {PHRASES[t.place]}") for t in _unique(things, lambda t: t.place) if t.color]
    if not asked:
        return None
    thing, name = rng.choice(asked)
    return QuestionAnswer("color", f"What color is the {name}?", f"The {name} is {thing.color}.")


def _ask_kind(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    named = _unique(things, lambda t: t.color)
    if not named:
        return None
    thing = rng.choice(named)
    return QuestionAnswer(
        "kind", f"What is the {thing.color} object?", f"The {thing.color} object is {_article(thing.noun)}."
    )


def _ask_at(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    placed = _unique(things, lambda t: t.place)
    if not placed:
        return None
    thing = rng.choice(placed)
    return QuestionAnswer(
        "object",
        f"What is {PHRASES[thing.place]}?",
        f"{PHRASES[thing.place].capitalize()} is {_article(thing.name)}.",
    )


def _ask_place(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    named = _named(things)
    if not named:
        return None
    thing = rng.choice(named)
    return QuestionAnswer(
        "place", f"Where is the {thing.name}?", f"The {thing.name} is {PHRASES[thing.place]}."
    )


def _ask_count(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    """All objects, those of a size, or those of a kind where colours do not tell them apart."""
    size = rng.choice(("small", "large"))
    plain = [t.noun for t in things]
    counted = [("object", len(things)), (f"{size} object", sum(t.size == size for t in things))]
    counted += [(noun, plain.count(noun)) for noun in sorted({t.noun for t in things if not t.color})]
    noun, count = rng.choice(counted)
    return QuestionAnswer("count", f"How many {plural(noun)} are there?", f"{_there_are(count, noun)}.")


def _ask_existence(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    """Half of the answers are "no"; what is asked for then is drawn as if it could be there.

    Half of the questions are about a colour; the others about a thing, and the wrong thing has the
    colour of one that is there.
    """
    colors = {t.color for t in things if t.color}
    present = rng.random() < 0.5
    if colors and rng.random() < 0.5:
        pool = sorted(colors) if present else [c for c in COMMON_COLORS if c not in colors]
        name = f"{rng.choice(pool)} object"
    else:
        thing = rng.choice(things)
        name = thing.name
        if not present:
            taken = {t.noun for t in things if t.color == thing.color}
            known = COMMON_SHAPES if taken <= set(COMMON_SHAPES) else ()
            nouns = [noun for noun in known if noun not in taken]
            if not nouns:
                return None
            name = f"{thing.color} {rng.choice(nouns)}" if thing.color else rng.choice(nouns)
    answer = f"{_article(name).capitalize()} is {'there' if present else 'missing'}."
    return QuestionAnswer("existence", f"Is there {_article(name)}?", answer)


def _ask_size(things: list[Thing], rng: random.Random) -> QuestionAnswer | None:
    named = _named(things)
    if not named:
        return None
    thing = rng.choice(named)
    return QuestionAnswer(
        "size", f"Is the {thing.name} small or large?", f"The {thing.name} is {thing.size}."
    )


ASKERS: dict[str, Callable[[list[Thing], random.Random], QuestionAnswer | None]] = {
    "color": _ask_color,
    "kind": _ask_kind,
    "object": _ask_at,
    "place": _ask_place,
    "count": _ask_count,
    "existence": _ask_existence,
    "size": _ask_size,
}


TAUGHT = (*ASKERS, "color", "color", "color", "object", "place", "count")
"""Kinds of the questions in conversations: those that take the most practice come more than once."""


def questions(
    record: ImageRecord, rng: random.Random, most: int, kinds: Sequence[str] = tuple(ASKERS)
) -> list[QuestionAnswer]:
    """Up to `most` different questions about `record`, of kinds drawn at random."""
    things = [_thing(i) for i in record.instances]
    found: dict[str, QuestionAnswer] = {}
    for _ in range(4 * most):
        if not things or len(found) == most:
            break
        asked = ASKERS[rng.choice(kinds)](things, rng)
        if asked:
            found.setdefault(asked.question, asked)
    return list(found.values())


def _describe(thing: Thing, count: int) -> str:
    name = f"{thing.size} {thing.name}"
    return f"{_article(name) if count == 1 else f'{_number(count)} {plural(name)}'} {PHRASES[thing.place]}"


def detail(record: ImageRecord, rng: random.Random) -> str:
    """A description of every object, in random order: each attribute must be looked up by the others."""
    things = [_thing(i) for i in record.instances]
    if not things:
        return rng.choice(record.captions)
    rng.shuffle(things)
    alike = Counter((t.size, t.name, t.place) for t in things)
    first = {(t.size, t.name, t.place): t for t in things}
    listed = ", ".join(_describe(first[key], count) for key, count in alike.items())
    return f"{_there_are(len(things))}: {listed}."


def _there_are(count: int, noun: str = "object") -> str:
    """ "There is one object", "There are two objects"."""
    return f"There is one {noun}" if count == 1 else f"There are {_number(count)} {plural(noun)}"


def complex_reasoning(record: ImageRecord, rng: random.Random) -> QuestionAnswer | None:
    """A question whose answer takes a step of reasoning, with the step written out."""
    things = [_thing(i) for i in record.instances]
    named = _named(things)
    if not named:
        return None
    gone = rng.choice(named)
    if len(things) < 2 or rng.random() < 0.5:
        left = _number(len(things) - 1)
        question = f"How many objects would be left without the {gone.name}?"
        answer = f"{_there_are(len(things))} now. Without the {gone.name} {left} would be left."
        return QuestionAnswer("complex", question, answer)
    others = [t for t in things if t is not gone]
    nearest = min(others, key=lambda t: (t.x - gone.x) ** 2 + (t.y - gone.y) ** 2)
    answer = (
        f"The {gone.name} is {PHRASES[gone.place]} and the {nearest.name} is {PHRASES[nearest.place]}, "
        f"so the {nearest.name} is the nearest."
    )
    return QuestionAnswer("complex", f"Which object is the nearest to the {gone.name}?", answer)


DETAIL_QUESTIONS = (
    "Describe the picture in detail.",
    "What can be seen in this picture?",
    "Give a full description of the picture.",
)


def respond(record: ImageRecord, kind: ResponseType, seed: int, most: int = 3) -> tuple[Turn, ...]:
    """One conversation of `kind` about `record`; an empty tuple where its boxes allow none.

    The same record, kind and seed give the same words. Conversations have up to `most` questions; the
    image's place is in front of the first turn.
    """
    rng = random.Random(f"{seed}/{kind}/{record.image_id}")
    pairs: list[tuple[str, str]]
    if kind == "conversation":
        pairs = [(q.question, q.answer) for q in questions(record, rng, most, TAUGHT)]
    elif kind == "detail":
        pairs = [(rng.choice(DETAIL_QUESTIONS), detail(record, rng))]
    else:
        asked = complex_reasoning(record, rng)
        pairs = [(asked.question, asked.answer)] if asked else []
    written: list[Turn] = []
    for number, (question, answer) in enumerate(pairs):
        prefix = f"{IMAGE_PLACEHOLDER}\n" if number == 0 else ""
        written += [Turn("human", prefix + question), Turn("gpt", answer)]
    return tuple(written)


def symbolic_answer(kind: Kind, context: Context, seed: int) -> str:
    """What the symbolic teacher writes about a context, in the format that `parse` reads.

    What the boxes settle is asked about; without boxes, or where they settle nothing, the captions are told.
    Of what there is a crowd, the boxes settle neither the number nor the place.
    """
    settled = tuple(thing for thing in context.instances if thing.category not in context.crowds)
    record = ImageRecord(context.image, "train", captions=context.captions, instances=settled)
    rng = random.Random(f"{seed}/{kind}/{context.id}")
    if kind == "detail":
        return detail(record, rng) if settled else " ".join(_sentence(c) for c in context.captions)
    if kind == "conversation":
        asked = questions(record, rng, 3, TAUGHT) or _told(context, rng)
    else:
        reasoned = complex_reasoning(record, rng)
        asked = [reasoned] if reasoned else [_compared(context, rng)]
    return "\n===\n".join(f"Question:\n{q.question}\n===\nAnswer:\n{q.answer}" for q in asked)


def _told(context: Context, rng: random.Random) -> list[QuestionAnswer]:
    question = rng.choice(("What does the picture show?", "What can be seen here?", "What is going on here?"))
    return [QuestionAnswer("caption", question, _sentence(rng.choice(context.captions)))]


def _compared(context: Context, rng: random.Random) -> QuestionAnswer:
    """Reasoning from captions alone: what several people saw is what stands out."""
    first, *others = rng.sample(context.captions, len(context.captions))
    shared = [
        word for word in _nouns(first) if sum(word in _nouns(other) for other in others) * 2 >= len(others)
    ]
    question = "What would most people who look at this picture notice first, and why?"
    seen = f" What stands out is: {', '.join(shared[:3])}." if shared and others else ""
    return QuestionAnswer("complex", question, f"{_sentence(first)}{seen} It is what the scene is about.")


def _nouns(text: str) -> list[str]:
    """Words long enough to mean something."""
    return [word.strip(".,").lower() for word in text.split() if len(word.strip(".,")) > 3]


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
