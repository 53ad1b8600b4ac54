"""Images with captions: a folder, a captions file, or a Parquet table, as both stages' samples.

Stage 1 pairs each caption with a request for a brief description. Stage 2 has conversations about
the same pictures: a description, and whether a given caption belongs to the picture. Held-out
pictures are asked the same yes/no question, half of them with a caption of another picture, so that
guessing without looking is right half of the time.

Rows of one picture (one caption a row is as usual as a list of them) are one image with all their captions.
"""

from __future__ import annotations

import hashlib
import posixpath
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rayva.data.bundle import DatasetBundle, Lazy
from rayva.data.caption_rows import CaptionRow, parse_row, read_rows
from rayva.data.locations import ImageFolder, is_local
from rayva.data.quarantine import BadRow, count_reasons, rejected
from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Question, Rejected, Sample, Split, Turn
from rayva.data.splits import UniqueIds, held_out
from rayva.errors import DataError, RecipeError
from rayva.recipes.schema import Data

MATCH_QUESTION = "Does this describe the picture: {caption}"
"""Asked in training and by the gate alike."""


@dataclass(frozen=True, slots=True)
class _Located:
    """A usable row whose picture exists."""

    name: str
    """What the row itself would call its picture."""
    uri: str | None
    picture: str
    """The same in all rows of a picture: its path or URI, or the sha256 of its bytes."""
    split_by: str
    """The name, as of the images of LLaVA JSON: a folder that both use is split alike."""
    row: CaptionRow


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image of the source without its bytes; `captions` are those of all its rows."""

    image_id: str
    split: Split
    captions: list[str]


def build(data: Data, brief: Sequence[str], detailed: Sequence[str]) -> DatasetBundle:
    """The tables of a recipe whose `data.source` is `captions`.

    Captions are kept in memory, image bytes are not. Pictures are held out by the hash of their name, or
    of their bytes where they have none: whatever rows and ids there are, a picture is on one side.

    Args:
        brief, detailed: wordings of the request for a short, and for a full, description.

    Raises:
        RecipeError: `data.captions` is not set.
        DataError: it names nothing that can be read as images with captions.
    """
    if not data.captions:
        raise RecipeError(
            "data.source is captions, but data.captions is not set",
            "set data.captions=PATH (a folder with images and captions, or a Parquet table)",
        )
    source = data.captions
    rejects: list[Rejected] = []
    pictures = _by_picture(_rows(source, rejects), data.test_fraction)
    entries = list(pictures.values())
    train = [entry for entry in entries if entry.split == "train"]
    test = [entry for entry in entries if entry.split == "test"]
    return DatasetBundle(
        images=Lazy(lambda: _images(source, pictures)),
        pretrain=Lazy(lambda: _pretrain(train, brief, data.seed)),
        finetune=Lazy(lambda: _finetune(train, brief, detailed, data)),
        questions=Lazy(lambda: _questions(test, data.seed)),
        rejected=rejects,
    )


def _rows(source: str, rejects: list[Rejected]) -> Iterator[_Located]:
    """Usable rows; the others are added to `rejects`."""
    usable = False
    rows = read_rows(source)
    folder = ImageFolder(rows.images)
    for index, value, fault in rows.values:
        name = f"row-{index}"
        try:
            if fault:
                raise fault
            row = parse_row(value)
            name = row.row_id or row.image or name
            located = _locate(name, row, folder)
        except BadRow as bad:
            rejects.append(rejected(source, name, bad))
            continue
        usable = True
        yield located
    if not usable:
        raise DataError(
            f"data.captions = {source} holds no image with a caption{_why(rejects)}",
            "give a folder with captions.jsonl, captions.csv, captions.parquet or NAME.txt beside each "
            "image, or a Parquet table with columns image (or path) and caption",
        )


def _why(rejects: Sequence[Rejected]) -> str:
    """Why no row could be used, for a message: no table of them is written then."""
    if not rejects:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejects).items())
    first = rejects[0]
    return f" (quarantined: {reasons}; the first, {first.row_id}: {first.detail or first.reason})"


def _locate(name: str, row: CaptionRow, folder: ImageFolder) -> _Located:
    if row.content is not None:
        digest = hashlib.sha256(row.content).hexdigest()
        return _Located(name, None, digest, digest, row)
    assert row.image is not None  # a row has one of the two
    uri = folder.resolve(row.image)
    picture = posixpath.normpath(uri.removeprefix("file://")) if is_local(uri) else uri
    return _Located(name, uri, picture, folder.plain(row.image), row)


def _by_picture(rows: Iterator[_Located], test_fraction: float) -> dict[str, _Entry]:
    """An entry for each picture, by `_Located.picture`: the first row's id, and the captions of all rows."""
    ids = UniqueIds()
    pictures: dict[str, _Entry] = {}
    for row in rows:
        entry = pictures.get(row.picture)
        if entry is None:
            split: Split = "test" if held_out(row.split_by, test_fraction) else "train"
            entry = pictures[row.picture] = _Entry(ids.claim(row.name), split, [])
        entry.captions.extend(row.row.captions)
    return pictures


def _images(source: str, pictures: dict[str, _Entry]) -> Iterator[ImageRecord]:
    """Each picture at its first row. Read again, since the bytes were not kept."""
    left = dict(pictures)
    for row in _rows(source, []):
        if entry := left.pop(row.picture, None):
            captions = tuple(entry.captions)
            yield ImageRecord(entry.image_id, entry.split, row.uri, row.row.content, captions)


def _pretrain(entries: list[_Entry], brief: Sequence[str], seed: int) -> Iterator[Sample]:
    for entry in entries:
        rng = random.Random(f"{seed}/pretrain/{entry.image_id}")
        for number, caption in enumerate(entry.captions):
            asked = f"{IMAGE_PLACEHOLDER}\n{rng.choice(brief)}"
            turns = (Turn("human", asked), Turn("gpt", caption))
            yield Sample(f"{entry.image_id}/caption-{number}", (entry.image_id,), turns, "caption")


def _finetune(
    entries: list[_Entry], brief: Sequence[str], detailed: Sequence[str], data: Data
) -> Iterator[Sample]:
    foreign = _OtherCaptions(entries)
    for entry in entries:
        for number in range(data.samples_per_image):
            rng = random.Random(f"{data.seed}/finetune/{entry.image_id}/{number}")
            several = len(entry.captions) > 1 and rng.random() < 0.5
            if several:
                described = (rng.choice(detailed), " ".join(_sentence(c) for c in entry.captions))
            else:
                described = (rng.choice(brief), rng.choice(entry.captions))
            pairs = [described, (_match(rng.choice(entry.captions)), "Yes")]
            other = foreign.draw(entry, rng)
            if other is not None:
                pairs.append((_match(other), "No"))
            rng.shuffle(pairs)
            kind = "detail" if several else "conversation"
            yield Sample(f"{entry.image_id}/{kind}-{number}", (entry.image_id,), _turns(pairs), kind)


def _questions(entries: list[_Entry], seed: int) -> Iterator[Question]:
    foreign = _OtherCaptions(entries)
    for entry in entries:
        rng = random.Random(f"{seed}/question/{entry.image_id}")
        other = foreign.draw(entry, rng)
        if other is None:
            continue  # a lone "yes" would unbalance the answers
        for caption, answer in ((rng.choice(entry.captions), "yes"), (other, "no")):
            yield Question(
                f"{entry.image_id}/{answer}", entry.image_id, "grounding", answer, _match(caption), (answer,)
            )


class _OtherCaptions:
    """Draws captions of other pictures."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries

    def draw(self, entry: _Entry, rng: random.Random) -> str | None:
        """A caption that `entry` does not have; None where a few draws find none."""
        own = {_plain(caption) for caption in entry.captions}
        for _ in range(20):
            caption = rng.choice(rng.choice(self._entries).captions)
            if _plain(caption) not in own:
                return caption
        return None


def _plain(caption: str) -> str:
    return caption.lower().rstrip(".! ")


def _sentence(caption: str) -> str:
    return caption if caption.endswith((".", "!", "?")) else f"{caption}."


def _match(caption: str) -> str:
    return MATCH_QUESTION.format(caption=_sentence(caption.replace(IMAGE_PLACEHOLDER, "")))


def _turns(pairs: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(pairs):
        prefix = f"{IMAGE_PLACEHOLDER}\n" if number == 0 else ""
        turns += [Turn("human", prefix + question), Turn("gpt", answer)]
    return tuple(turns)
