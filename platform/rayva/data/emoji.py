"""Emoji with their names, tags and groups: real pictures and words that fit on a laptop.

Fluent 3D pictures are joined with emojibase's words by code point. Some concepts are held out: their
Fluent pictures ask whether a model knows what kind of thing it has never seen, and Noto's pictures of
the same concepts ask it in a drawing style that it has never seen either.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayva.data.bundle import DatasetBundle
from rayva.data.general_knowledge import text_questions, text_samples
from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Question, Sample, Split, Turn
from rayva.data.splits import held_out, share_of
from rayva.errors import DataError, RecipeError
from rayva.recipes.schema import Data

WORDS = "node_modules/emojibase-data/en/data.json"
FLUENT = "node_modules/@lobehub/fluent-emoji-3d/assets"
NOTO = "node_modules/emoji-datasource-google/img/google/64"

GROUPS = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}
"""Emojibase's groups in words. Components have no pictures; flags are not open-sourced upstream."""
NOT_OPEN = ("paperclip", "technologist", "video game")
"""Upstream does not open-source the pictures whose labels hold these words."""

_REMEDY = "fetch them with `python pipelines/fetch_smol.py --to DIR` and set data.emoji_dir=DIR/emoji"
_PLAIN_QUOTES = str.maketrans("\u2019\u2018\u201c\u201d", "''\"\"")

NAME_QUESTIONS = ("What is this?", "Name this.")
GROUP_QUESTIONS = ("Which group does it belong to?", "What kind of thing is it?")
TAG_QUESTION = "Give tags for it."
DESCRIBE_QUESTION = "Describe it."
NAME_SEEN_QUESTIONS = 300
NOTO_SEEN_QUESTIONS = 100


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji: what it shows, without skin tones, and where its pictures are."""

    code: str
    label: str
    group: str
    tags: tuple[str, ...]
    fluent: Path
    noto: Path | None


def build(data: Data) -> DatasetBundle:
    """The tables of a recipe whose `data.source` is `emoji`.

    `data.test_fraction` of the concepts are held out, chosen by the hash of their code points.
    Questions: task "grounding" (group, held-out concepts, Fluent), "group_noto" (the same in Noto's
    style), "group_noto_seen" (trained concepts in Noto's style), "name_seen" (exact names of trained
    pictures) and "text" (no picture).

    Raises:
        RecipeError: `data.emoji_dir` is not set.
        DataError: that folder does not hold the packages.
    """
    if not data.emoji_dir:
        raise RecipeError(
            "data.source is emoji, but data.emoji_dir is not set",
            _REMEDY,
        )
    concepts = read_concepts(Path(data.emoji_dir).expanduser())
    test = [c for c in concepts if held_out(c.code, data.test_fraction)]
    train = [c for c in concepts if not held_out(c.code, data.test_fraction)]
    noto_seen = _some([c for c in train if c.noto], NOTO_SEEN_QUESTIONS, "noto")
    images = [
        *(_image("fluent", c, c.fluent, "train") for c in train),
        *(_image("fluent", c, c.fluent, "test") for c in test),
        *(_image("noto", c, c.noto, "test") for c in (*test, *noto_seen) if c.noto),
    ]
    return DatasetBundle(
        images=images,
        pretrain=[_pretrain_sample(c) for c in train],
        finetune=[*_finetune_samples(train, data.samples_per_image, data.seed), *text_samples()],
        questions=[
            *(_group_question("grounding", "fluent", c) for c in test),
            *(_group_question("group_noto", "noto", c) for c in test if c.noto),
            *(_group_question("group_noto_seen", "noto", c) for c in noto_seen),
            *(_name_question(c) for c in _some(train, NAME_SEEN_QUESTIONS, "name")),
            *text_questions(),
        ],
    )


def read_concepts(folder: Path) -> list[Concept]:
    """Joins the packages under `folder` by code point, in emojibase's order.

    Left out: variants in skin colour, flags and components, pictures that upstream does not
    open-source, and concepts without a Fluent picture.

    Raises:
        DataError: a package is missing or not as expected.
    """
    fluent, noto = _pictures(folder / FLUENT, "webp"), _pictures(folder / NOTO, "png")
    concepts = []
    for entry in _read_words(folder / WORDS):
        code = _plain_code(str(entry["hexcode"]))
        group = GROUPS.get(entry.get("group", -1))
        label = str(entry["label"]).translate(_PLAIN_QUOTES)
        if group is None or code not in fluent or any(word in label for word in NOT_OPEN):
            continue
        tags = _clean_tags(label, entry.get("tags", []))
        concepts.append(Concept(code, label, group, tags, fluent[code], noto.get(code)))
    if not concepts:
        raise _not_fetched(folder, "its words and pictures have nothing in common")
    return concepts


def _read_words(path: Path) -> list[dict[str, Any]]:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _not_fetched(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _not_fetched(path, f"it is not JSON: {error}") from error
    if not isinstance(words, list) or not all(
        isinstance(w, dict) and "hexcode" in w and "label" in w for w in words
    ):
        raise _not_fetched(path, "it is not in emojibase's form")
    return words


def _pictures(folder: Path, suffix: str) -> dict[str, Path]:
    found = {_plain_code(path.stem): path for path in sorted(folder.glob(f"*.{suffix}"))}
    if not found:
        raise _not_fetched(folder, "there are no pictures in it")
    return found


def _not_fetched(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} cannot be used: {why}",
        _REMEDY,
    )


def _plain_code(code: str) -> str:
    """Code points in lower case without the variation selector, which the packages set differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _clean_tags(label: str, tags: list[str]) -> tuple[str, ...]:
    known = set(label.lower().split())
    return tuple(tag for tag in tags if tag.isascii() and tag.isalpha() and tag.lower() not in known)


def _some(concepts: list[Concept], most: int, salt: str) -> list[Concept]:
    return sorted(concepts, key=lambda c: share_of(c.code, salt))[:most]


def _image(style: str, concept: Concept, path: Path, split: Split) -> ImageRecord:
    return ImageRecord(f"{style}/{concept.code}", split, content=path.read_bytes(), captions=(concept.label,))


def _pretrain_sample(concept: Concept) -> Sample:
    turns = (Turn("human", f"{IMAGE_PLACEHOLDER}\n{NAME_QUESTIONS[0]}"), Turn("gpt", concept.label))
    return Sample(f"caption/{concept.code}", (f"fluent/{concept.code}",), turns, "caption")


def _finetune_samples(concepts: list[Concept], per_image: int, seed: int) -> Iterator[Sample]:
    """Short conversations: one of four asks the name alone, the others the group and what else is known.

    Names have been learnt in stage 1 and are only kept here; the group leads where it is asked, because
    behind the name it could be read off.
    """
    for concept in concepts:
        for number in range(per_image):
            rng = random.Random(f"{seed}/emoji/{concept.code}/{number}")
            pairs = [_name_pair(concept, rng)]
            if number % 4:
                pairs = [_group_pair(concept, rng), *_more_pairs(concept, pairs[0], rng)]
            turns: list[Turn] = []
            for question, answer in pairs:
                prefix = "" if turns else f"{IMAGE_PLACEHOLDER}\n"
                turns += [Turn("human", prefix + question), Turn("gpt", answer)]
            image_ids = (f"fluent/{concept.code}",)
            yield Sample(f"conversation/{concept.code}/{number}", image_ids, tuple(turns), "conversation")


def _name_pair(concept: Concept, rng: random.Random) -> tuple[str, str]:
    return rng.choice(NAME_QUESTIONS), concept.label


def _group_pair(concept: Concept, rng: random.Random) -> tuple[str, str]:
    return rng.choice(GROUP_QUESTIONS), concept.group


def _more_pairs(concept: Concept, name: tuple[str, str], rng: random.Random) -> list[tuple[str, str]]:
    """The name, now and then tags or a sentence. These are rare, because tokens are what time goes into."""
    if len(concept.tags) < 2 or rng.random() < 0.7:
        return [name]
    tags = rng.sample(concept.tags, min(3, len(concept.tags)))
    if rng.random() < 0.5:
        return [name, (TAG_QUESTION, ", ".join(tags))]
    related = f"{', '.join(tags[:-1])} and {tags[-1]}"
    return [(DESCRIBE_QUESTION, f"The picture shows this: {concept.label}. It has to do with {related}.")]


def _group_question(task: str, style: str, concept: Concept) -> Question:
    return Question(
        f"{task}/{concept.code}",
        f"{style}/{concept.code}",
        task,
        concept.group,
        GROUP_QUESTIONS[0],
        (concept.group,),
    )


def _name_question(concept: Concept) -> Question:
    return Question(
        f"name_seen/{concept.code}",
        f"fluent/{concept.code}",
        "name_seen",
        concept.group,
        NAME_QUESTIONS[0],
        (concept.label,),
    )
