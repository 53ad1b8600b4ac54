"""LLaVA's own data format: JSON or JSON Lines of {id, image, conversations}.

LCS-558K, mix665k and the ScienceQA conversions load unchanged: rows without image, rows with several
images, ids that are missing or repeated. Rows that cannot be used are quarantined with a reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast, get_args

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
from rayva.recipes.schema import Data


@dataclass(frozen=True, slots=True)
class LlavaRow:
    """A row that can be used, with its images as they are named in the file."""

    row_id: str | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def parse_row(value: object) -> LlavaRow:
    """Checks one row of LLaVA JSON.

    No row is refused for what is said in it: empty turns, a last question without answer and an
    answer before the first question stay, and the template decides how they are written. Rows without
    images may hold the text `<image>`; in rows with images every `<image>` needs its image, where
    repetitions within a turn count once if there are too many, as the original reads them.

    Raises:
        BadRow: with reason "not_an_object", "no_conversations", "malformed_turn", "unknown_role",
            "roles_do_not_alternate", "no_answer", "invalid_text", "bad_image_field",
            "more_images_in_text_than_given" or "more_images_given_than_in_text".
    """
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"the row is a {type(value).__name__}")
    turns = _parse_turns(value.get("conversations"))
    images = _parse_images(value.get("image"))
    turns = _matched_markers(turns, len(images))
    return LlavaRow(row_name(value), images, turns)


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


HELD_OUT_PREFIX = "held_out://"
"""Before the ids of the gate's images where they have a folder of their own."""


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
    pretrain_root = data.pretrain_images or parent(str(data.pretrain_json))
    finetune_root = data.finetune_images or parent(str(data.finetune_json))
    # Two folders may use one name for two pictures: then stage 1's get ids of their own.
    prefix = "pretrain://" if absolute(pretrain_root) != absolute(finetune_root) else ""
    tested = held_out_file(data)
    same = tested is not None and absolute(tested.root) == absolute(finetune_root)
    asked = None if tested is None else replace(tested, image_prefix="" if same else HELD_OUT_PREFIX)
    pretrain = LlavaFile(
        "data.pretrain_json", str(data.pretrain_json), pretrain_root, data.test_fraction,
        image_prefix=prefix, held_out_uris=None if asked is None else asked.uris(),
    )  # fmt: skip
    finetune = LlavaFile(
        "data.finetune_json", str(data.finetune_json), finetune_root, data.test_fraction,
        asks=asked is None, held_out_uris=pretrain.held_out_uris,
    )  # fmt: skip
    files = [pretrain, finetune, *([asked] if asked else [])]
    return DatasetBundle(
        images=Lazy(lambda: distinct(chain.from_iterable(file.images() for file in files))),
        pretrain=Lazy(lambda: pretrain.samples(rejects)),
        finetune=Lazy(lambda: finetune.samples(rejects)),
        questions=Lazy(lambda: asked.questions(rejects) if asked else finetune.questions()),
        rejected=rejects,
    )


def held_out_file(data: Data) -> LlavaFile | None:
    """The file of the gate's questions, where the recipe names one."""
    if data.held_out_json is None:
        return None
    root = data.held_out_images or parent(data.held_out_json)
    return LlavaFile("data.held_out_json", data.held_out_json, root, 1.0, asks=True, all_held_out=True)


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


@dataclass(frozen=True, slots=True)
class LlavaFile:
    """One LLaVA JSON with its image folder; rows that cannot be used are left out of everything."""

    setting: str
    """The recipe's key that names it."""
    uri: str
    root: str
    """Its image folder."""
    test_fraction: float
    asks: bool = False
    """Whether its held-out rows become questions."""
    image_prefix: str = ""
    dataset: str = ""
    """Its name in a mix, which then stands before the samples' ids."""
    held_out_uris: frozenset[str] | None = None
    """Images that are not for training; None leaves that to a hash of names."""
    all_held_out: bool = False
    """Whether the file is the gate's own: nothing in it is trained on."""

    def samples(self, rejects: list[Rejected]) -> Iterator[Sample]:
        """What is trained on; refused rows are added to `rejects`."""
        return (row.sample for row in self._rows(rejects) if row.split == "train")

    def images(self) -> Iterator[ImageRecord]:
        """The images of samples and questions, as often as they occur."""
        for row in self._rows([]):
            if row.split == "test" and not (self.asks and _question(row)):
                continue
            for image_id, uri in zip(row.sample.image_ids, row.uris, strict=True):
                yield ImageRecord(image_id, row.split, uri=uri)

    def uris(self) -> frozenset[str]:
        """All images of the file, whether or not anything is asked about them."""
        return frozenset(uri for row in self._rows([]) for uri in row.uris)

    def questions(self, rejects: list[Rejected] | None = None) -> Iterator[Question]:
        """Held-out rows that can be graded; none unless it `asks`. Refused rows are added to `rejects`."""
        for row in self._rows([] if rejects is None else rejects) if self.asks else ():
            if row.split == "test" and (question := _question(row)):
                yield question

    def _rows(self, rejects: list[Rejected]) -> Iterator[_Located]:
        ids, folder = UniqueIds(), ImageFolder(self.root)
        for row in read_json_rows(self.uri, self.setting):
            name = f"row-{row.index}"
            try:
                if row.error:
                    raise BadRow("not_json", row.error)
                parsed = parse_row(row.value)
                name = ids.claim(parsed.row_id or name)
                said = row.value if self.all_held_out else {}
                match, kind = _grading(said.get("match"), parsed), _kind(said)
                yield self._locate(name, parsed, folder, match, kind)
            except BadRow as error:
                rejects.append(rejected(self.uri, name, error))

    def _locate(
        self, name: str, row: LlavaRow, folder: ImageFolder, match: Match | None, kind: str | None
    ) -> _Located:
        uris = tuple(folder.resolve(image) for image in row.images)
        test = self.all_held_out or self._is_held_out(row.images, uris)
        image_ids = tuple(self._image_id(image) for image in row.images)
        sample_id = f"{self.dataset}/{name}" if self.dataset else name
        sample = Sample(sample_id, image_ids, row.turns, dataset=self.dataset)
        return _Located(sample, uris, "test" if test else "train", match, kind)

    def _is_held_out(self, images: Sequence[str], uris: Sequence[str]) -> bool:
        if self.held_out_uris is not None:
            return not self.held_out_uris.isdisjoint(uris)
        return any(held_out(_normal(image), self.test_fraction) for image in images)

    def _image_id(self, name: str) -> str:
        return name if "://" in name or os.path.isabs(name) else self.image_prefix + _normal(name)


def distinct(images: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    """Every image id once."""
    seen: set[str] = set()
    for image in images:
        if image.image_id not in seen:
            seen.add(image.image_id)
            yield image


def _normal(name: str) -> str:
    return name.removeprefix("./")


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
