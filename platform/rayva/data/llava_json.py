"""LLaVA's own data format: JSON or JSON Lines of {id, image, conversations}.

LCS-558K, mix665k and the ScienceQA conversions load unchanged: rows without image, rows with several
images, ids that are missing or repeated. Rows that cannot be used are quarantined with a reason.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, cast, get_args

from rayva.data.answer_match import Match, find_part, how_to_grade
from rayva.data.bundle import DatasetBundle, Lazy
from rayva.data.json_rows import read_json_rows
from rayva.data.locations import ImageFolder, absolute, parent
from rayva.data.quarantine import BadRow, checked_text, rejected
from rayva.data.schema import (
    IMAGE_PLACEHOLDER,
    ImageRecord,
    Question,
    Rejected,
    Role,
    Sample,
    Split,
    Turn,
)
from rayva.data.splits import UniqueIds, held_out
from rayva.errors import RecipeError
from rayva.recipes.schema import STAGES, Data, StageName

Noted = Literal["image_mark_without_image", "image_mark_repeated"]
"""A row without images has `<image>` in a question, where it stays text; a turn repeats `<image>` beyond the
images there are, and the repetitions are left out. Both may be a mistake in the file."""


@dataclass(frozen=True, slots=True)
class LlavaRow:
    """A row that can be used, with its images as they are named in the file."""

    row_id: str | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    noted: tuple[Noted, ...] = ()
    """What is odd about it, though it can be used."""


def parse_row(value: object) -> LlavaRow:
    """Checks one row of LLaVA JSON.

    No row is refused for what is said in it: empty turns, a last question without answer and an
    answer before the first question stay, and the template decides how they are written. Rows without
    images may hold the text `<image>`; in rows with images every `<image>` needs its image, where
    repetitions within a turn count once if there are too many, as the original reads them; both are `noted`.
    A list under `images` stands for `image` where that has nothing.

    Raises:
        BadRow: with reason "not_an_object", "no_conversations", "malformed_turn", "unknown_role",
            "roles_do_not_alternate", "no_answer", "invalid_text", "bad_image_field",
            "more_images_in_text_than_given" or "more_images_given_than_in_text".
    """
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"the row is a {type(value).__name__}")
    turns = _parse_turns(value.get("conversations"))
    images = _parse_images(image_field(value))
    matched = _matched_markers(turns, len(images))
    noted: tuple[Noted, ...] = ("image_mark_repeated",) if matched != turns else ()
    if not images and count_markers(turns):
        noted = ("image_mark_without_image",)
    return LlavaRow(row_name(value), images, matched, noted)


def image_field(value: dict[str, object]) -> object:
    """`image`; where it has nothing, a list under `images`, as Hugging Face's tables call it."""
    image, images = value.get("image"), value.get("images")
    return images if image in (None, "") and isinstance(images, list) else image


def row_name(value: dict[str, object]) -> str | None:
    """The row's own id as text; None where it has none.

    Raises:
        BadRow: "invalid_text" where UTF-8 cannot hold it.
    """
    row_id = value.get("id")
    usable = isinstance(row_id, (str, int)) and not isinstance(row_id, bool) and str(row_id)
    return checked_text(str(row_id)) if usable else None


def count_markers(turns: Iterable[Turn]) -> int:
    """Number of `<image>` in human turns; in answers it is text."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")


def collapse_markers(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Turns in which every human turn has at most one `<image>`: how the original reads repeated ones."""
    return tuple(
        replace(turn, text=_first_marker_only(turn.text)) if turn.role == "human" else turn for turn in turns
    )


def _first_marker_only(text: str) -> str:
    before, marker, after = text.partition(IMAGE_PLACEHOLDER)
    return before + marker + after.replace(IMAGE_PLACEHOLDER, "")


def build(data: Data) -> DatasetBundle:
    """The tables of a recipe whose `data.source` is `llava`.

    Images are split by the hash of their name, so that a picture that both files use is on the same
    side. Held-out pictures are not trained on; rows of the stage-2 file about one such picture whose
    first answer can be graded become questions (task "grounding"). With `data.held_out_json` the
    pictures of that file are held out instead, and its rows are the questions.

    Raises:
        RecipeError: a file is not named in the recipe.
        DataError: a file is missing or not JSON.
    """
    for setting in ("pretrain_json", "finetune_json"):
        if not getattr(data, setting):
            raise RecipeError(
                f"data.source is llava, but data.{setting} is not set",
                f"set data.{setting}=PATH (a LLaVA JSON file or JSON Lines; both stages may use one file)",
            )
    rejects: list[Rejected] = []
    noted: Counter[str] = Counter()
    held_out_file = held_out_questions(data) if data.held_out_json else None
    pretrain, finetune = (_of_stage(stage, data, held_out_file) for stage in STAGES)
    # Rows of the stage-2 file are told of when it is read as samples.
    asked = held_out_file or finetune
    asked_rejects, asked_noted = (rejects, noted) if held_out_file else ([], Counter())
    files = dict.fromkeys((pretrain, finetune, asked))
    return DatasetBundle(
        images=Lazy(lambda: distinct(chain.from_iterable(file.images() for file in files))),
        pretrain=Lazy(lambda: pretrain.samples(rejects, noted)),
        finetune=Lazy(lambda: finetune.samples(rejects, noted)),
        questions=Lazy(lambda: asked.questions(asked_rejects, asked_noted)),
        rejected=rejects,
        noted=noted,
    )


def held_out_questions(data: Data, image_prefix: str | None = None) -> LlavaFile:
    """The file of `data.held_out_json`, whose images are for questions alone."""
    uri, root = location(data, "held_out")
    prefix = _prefix(data, "held_out") if image_prefix is None else image_prefix
    return LlavaFile("data.held_out_json", uri, root, asks=True, all_held_out=True, image_prefix=prefix)


def location(data: Data, part: Literal["pretrain", "finetune", "held_out"]) -> tuple[str, str]:
    """A file of the recipe, and where its images are: in the folder named for them, or beside it."""
    uri = str(getattr(data, f"{part}_json"))
    return uri, getattr(data, f"{part}_images") or parent(uri)


def _prefix(data: Data, part: Literal["pretrain", "finetune", "held_out"]) -> str:
    """Two folders may use one name for two pictures: only those of stage 2 have it as their id."""
    same = absolute(location(data, part)[1]) == absolute(location(data, "finetune")[1])
    return "" if same else f"{part}://"


def _of_stage(stage: StageName, data: Data, held_out_file: LlavaFile | None) -> LlavaFile:
    uri, root = location(data, stage)
    return LlavaFile(
        f"data.{stage}_json",
        uri,
        root,
        test_fraction=data.test_fraction,
        asks=stage == "finetune" and held_out_file is None,
        image_prefix=_prefix(data, stage),
        held_out=held_out_file,
    )


@dataclass(frozen=True, slots=True)
class _Located:
    """A row whose images exist; `uris` belong to the sample's image ids, one by one."""

    sample: Sample
    uris: tuple[str, ...]
    split: Split
    match: Match | None
    """How the first answer is graded; None where that takes a judge."""
    kind: str | None
    """The row's own name for the kind of its question."""


@dataclass(frozen=True)
class LlavaFile:
    """One LLaVA JSON with its image folder; rows that cannot be used are left out of everything."""

    setting: str
    """The recipe's key that names it."""
    uri: str
    root: str
    """Its image folder."""
    test_fraction: float = 0.0
    asks: bool = False
    """Whether its held-out rows become questions."""
    image_prefix: str = ""
    dataset: str = ""
    """Its name in a mix, which then stands before the samples' ids."""
    held_out: LlavaFile | None = None
    """The file whose images are not for training; without one, a hash of names decides."""
    all_held_out: bool = False
    """Every row is a question, and may say how it is graded and of what kind it is."""

    def samples(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Sample]:
        """What is trained on; refused rows are added to `rejects`, odd ones counted in `noted`."""
        return (row.sample for row in self._rows(rejects, noted) if row.split == "train")

    def images(self) -> Iterator[ImageRecord]:
        """The images of samples and questions, as often as they occur."""
        for row in self._rows([], Counter()):
            if row.split == "test" and not (self.asks and _question(row)):
                continue
            for image_id, uri in zip(row.sample.image_ids, row.uris, strict=True):
                yield ImageRecord(image_id, row.split, uri=uri)

    def questions(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[Question]:
        """Held-out rows that can be graded; none unless it `asks`. The rest as in `samples`."""
        for row in self._rows(rejects, noted) if self.asks else ():
            if row.split == "test" and (question := _question(row)):
                yield question

    @functools.cached_property
    def image_uris(self) -> frozenset[str]:
        """All images of the file, whether or not anything is asked about them."""
        return frozenset(uri for row in self._rows([], Counter()) for uri in row.uris)

    def _rows(self, rejects: list[Rejected], noted: Counter[str]) -> Iterator[_Located]:
        ids, folder = UniqueIds(), ImageFolder(self.root)
        for row in read_json_rows(self.uri, self.setting):
            name = f"row-{row.index}"
            try:
                if row.error:
                    raise BadRow("not_json", row.error)
                parsed = parse_row(row.value)
                name = ids.claim(parsed.row_id or name)
                said = row.value if self.all_held_out else {}
                located = self._locate(name, parsed, folder, _grading(said.get("match"), parsed), _kind(said))
            except BadRow as error:
                rejects.append(rejected(self.uri, name, error))
                continue
            noted.update(parsed.noted)
            yield located

    def _locate(
        self, name: str, row: LlavaRow, folder: ImageFolder, match: Match | None, kind: str | None
    ) -> _Located:
        uris = tuple(folder.resolve(image) for image in row.images)
        names = [folder.plain(image) for image in row.images]
        image_ids = tuple(self._image_id(name) for name in names)
        sample_id = f"{self.dataset}/{name}" if self.dataset else name
        sample = Sample(sample_id, image_ids, row.turns, dataset=self.dataset)
        split: Split = "test" if self._is_held_out(names, uris) else "train"
        return _Located(sample, uris, split, match, kind)

    def _is_held_out(self, images: Sequence[str], uris: Sequence[str]) -> bool:
        if self.all_held_out:
            return True
        if self.held_out is not None:
            return not self.held_out.image_uris.isdisjoint(uris)
        return any(held_out(image, self.test_fraction) for image in images)

    def _image_id(self, name: str) -> str:
        return name if "://" in name or os.path.isabs(name) else self.image_prefix + name


def distinct(images: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    """Every image id once."""
    seen: set[str] = set()
    for image in images:
        if image.image_id not in seen:
            seen.add(image.image_id)
            yield image


def _grading(said: object, row: LlavaRow) -> Match | None:
    """How the row's first answer is graded: as the row itself says (`match`), or as a rule finds.

    Raises:
        BadRow: "bad_match" where the row names no way of grading, or one that its answer does not allow.
    """
    first = _first_question(row.turns)
    answer = row.turns[first + 1].text.strip()
    if said is None:
        return how_to_grade(_asked(row.turns[first]), answer)
    if said not in get_args(Match):
        raise BadRow("bad_match", f"`match` is {said!r}, not one of {', '.join(get_args(Match))}")
    if not answer or (said != "text" and find_part(str(said), answer) is None):
        raise BadRow("bad_match", f"{answer!r} has nothing to be graded by as {said}")
    return cast(Match, said)


def _kind(said: dict[str, object]) -> str | None:
    kind = said.get("kind")
    return checked_text(kind) if isinstance(kind, str) and kind else None


def _question(row: _Located) -> Question | None:
    """The row's first exchange as a question, where it is about one image and can be graded.

    Later exchanges may lean on earlier ones, so they are not asked on their own.
    """
    first = _first_question(row.sample.turns)
    text, answer = _asked(row.sample.turns[first]), row.sample.turns[first + 1].text.strip()
    if len(row.uris) != 1 or not text or row.match is None:
        return None
    return Question(
        question_id=row.sample.sample_id,
        image_id=row.sample.image_ids[0],
        task="grounding",
        kind=row.kind or (_answer_kind(answer) if row.match == "text" else row.match),
        question=text,
        accepted=(answer,),
        match=row.match,
    )


def _asked(turn: Turn) -> str:
    return turn.text.replace(IMAGE_PLACEHOLDER, "").strip()


def _answer_kind(answer: str) -> str:
    word = answer.lower().rstrip(".")
    if word in ("yes", "no"):
        return "yes_no"
    return "number" if word.replace(".", "").replace(",", "").isdecimal() else "other"


def _parse_turns(value: object) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow("no_conversations", "`conversations` is missing, empty, or no list")
    turns: list[Turn] = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("malformed_turn", f"turn {number} is no object with a text `value`")
        role = turn.get("from")
        if role not in ("human", "gpt"):
            raise BadRow("unknown_role", f"turn {number} is from {role!r}, not human or gpt")
        if turns and role == turns[-1].role:
            raise BadRow("roles_do_not_alternate", f"turn {number} is from {role} again")
        turns.append(Turn(cast(Role, role), checked_text(turn["value"])))
    if len(turns) < _first_question(turns) + 2:
        raise BadRow("no_answer", "no question has an answer")
    return tuple(turns)


def _first_question(turns: Sequence[Turn]) -> int:
    """Index of the first human turn: the second turn where an answer leads."""
    return int(turns[0].role == "gpt")


def _parse_images(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    names: list[str] = []
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name.strip():
            raise BadRow("bad_image_field", f"`image` holds {name!r}, which is no file name")
        names.append(checked_text(name))
    return tuple(names)


def _matched_markers(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """The turns with as many `<image>` as there are images, or with none."""
    markers = count_markers(turns)
    if images and markers > images:
        collapsed = collapse_markers(turns)
        if count_markers(collapsed) == images:
            return collapsed
        raise BadRow("more_images_in_text_than_given", f"{markers} {IMAGE_PLACEHOLDER} for {images} images")
    if 0 < markers < images:
        raise BadRow("more_images_given_than_in_text", f"{markers} {IMAGE_PLACEHOLDER} for {images} images")
    return turns
