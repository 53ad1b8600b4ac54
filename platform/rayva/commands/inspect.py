"""Shows how the rows of a LLaVA JSON file will be seen in training.

For the first rows: the prompt, its tokens, and which of them are supervised. For all of them: lengths,
the share of supervised tokens, and what will be truncated or rejected and why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from rayva.data.json_rows import JsonRow, read_json_rows
from rayva.data.llava_json import Noted, collapse_markers, count_markers, image_field, parse_row, row_name
from rayva.data.locations import ImageFolder
from rayva.data.quarantine import BadRow, printable
from rayva.data.schema import IMAGE_PLACEHOLDER, Role, Turn
from rayva.progress import Progress
from rayva.text.conversation import (
    BadConversation,
    ImagePosition,
    Message,
    messages_from_turns,
    place_image,
    sample_rng,
)
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, encode_sample
from rayva.text.templates import TEMPLATE_NAMES, Template, get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Status = Literal["ok", "truncated", "rejected"]
OverLength = Literal["truncate", "drop"]
_BARS = 10
_BAR_WIDTH = 40
_SHOWN = 1500
"""Characters of a prompt, and tokens of a row, that the report shows."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than none")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA.json", help="LLaVA JSON or JSON Lines: a path or an fsspec URI")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder or hub name of a tokenizer")
    parser.add_argument("--template", required=True, choices=TEMPLATE_NAMES)
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of a report")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images; missing ones reject their rows"
    )
    parser.add_argument(
        "--image-position",
        choices=("data", "front", "random"),
        default="front",
        help="where images stand in their turns (default: front, as LLaVA 1.0 and later)",
    )
    parser.add_argument("--system", help="replaces the template's system message; '' leaves it out")
    parser.add_argument("--max-tokens", type=_count, default=2048, help="longest sequence (default: 2048)")
    parser.add_argument(
        "--image-tokens",
        type=_count,
        default=256,
        help="visual tokens of an image (default: 256, CLIP at 224 px)",
    )
    parser.add_argument(
        "--over-length",
        choices=("truncate", "drop"),
        default="truncate",
        help="what becomes of longer rows, as conversation.over_length of a recipe (default: truncate)",
    )
    parser.add_argument(
        "--limit", "--rows", type=_count, dest="limit", metavar="N", help="reads the first N rows only"
    )
    parser.add_argument("--show", type=_count, default=3, metavar="N", help="rows shown in full (default: 3)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of --image-position random: a stage's seed shows its first epoch"
    )


@dataclass(frozen=True, slots=True)
class Inspected:
    """One row as training will see it.

    `length` counts the visual tokens too; `kept` of them are within the limit, and `supervised` of
    those are learnt. A rejected row is encoded all the same where that can be done, so that one can
    see what it holds.
    """

    row_id: str
    encoded: Encoded
    length: int
    kept: int
    supervised: int
    status: Status
    reason: str | None = None
    detail: str = ""
    note: str | None = None
    """What is worth telling of a row that is taken as it is."""


class Inspector:
    """Encodes rows and tells what becomes of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        image_position: ImagePosition = "front",
        max_tokens: int = 2048,
        image_tokens: int = 256,
        over_length: OverLength = "truncate",
        images: str | None = None,
        seed: int = 0,
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._position: ImagePosition = image_position
        self._max_tokens, self._image_tokens = max_tokens, image_tokens
        self._over_length = over_length
        self._folder = ImageFolder(images) if images else None
        self._seed = seed
        self._accepted = 0
        """Rows so far that the data step takes: their numbers are those of training's samples."""

    def inspect(self, row: JsonRow) -> Inspected:
        """Encodes one row; whatever is wrong with it becomes its status and reason."""
        row_id, reason, detail = _row_id(row), None, ""
        try:
            try:
                messages = self._messages(row)
            except BadRow as error:
                reason, detail = error.reason, error.detail
                messages = _lenient_messages(row.value)
            rng = sample_rng(self._seed, 0, self._accepted)
            self._accepted += not reason
            messages = place_image(messages, self._position, rng)
            encoded = encode_sample(messages, self._template, self._tokenizer)
        except BadConversation as error:
            reason, detail = reason or error.reason, detail or error.what
            return Inspected(row_id, Encoded([], [], ""), 0, 0, 0, "rejected", reason, detail)
        length, kept, supervised = self._measure(encoded)
        if reason:
            return Inspected(row_id, encoded, length, kept, supervised, "rejected", reason, detail)
        if length <= self._max_tokens:
            return Inspected(row_id, encoded, length, kept, supervised, "ok", note=_note(row.value))
        status: Status = "rejected" if self._over_length == "drop" else "truncated"
        if IMAGE_TOKEN_INDEX not in encoded.input_ids and status == "truncated":
            # With images the cut depends on the vision tower: such rows are shown whole.
            cut = slice(self._max_tokens)
            encoded = Encoded(encoded.input_ids[cut], encoded.labels[cut], encoded.prompt)
        detail = f"{length} tokens, {self._max_tokens} allowed"
        return Inspected(row_id, encoded, length, kept, supervised, status, "over_max_tokens", detail)

    def _measure(self, encoded: Encoded) -> tuple[int, int, int]:
        """Length with images in place, how much of it is kept, and how much of that is supervised."""
        length = supervised = 0
        for token_id, label in zip(encoded.input_ids, encoded.labels, strict=True):
            length += self._image_tokens if token_id == IMAGE_TOKEN_INDEX else 1
            supervised += label != IGNORE_INDEX and length <= self._max_tokens
        return length, min(length, self._max_tokens), supervised

    def _messages(self, row: JsonRow) -> list[Message]:
        """What training makes of the row; raises BadRow where the data step would quarantine it."""
        if row.error:
            raise BadRow("not_json", row.error)
        parsed = parse_row(row.value)
        if self._folder:
            for image in parsed.images:
                self._folder.resolve(image)
        return messages_from_turns(parsed.turns, len(parsed.images))


_NOTES: dict[Noted, str] = {
    "image_mark_without_image": f"no image, so {IMAGE_PLACEHOLDER} in the text stays text",
    "image_mark_repeated": f"{IMAGE_PLACEHOLDER} repeated in a turn, beyond the images: counts once",
}


def _note(value: Any) -> str | None:
    if noted := parse_row(value).noted:
        return _NOTES[noted[0]]
    if image_field(value) and not count_markers(_lenient_turns(value)):
        return f"no {IMAGE_PLACEHOLDER} in the text: images go before the first question"
    return None


def _row_id(row: JsonRow) -> str:
    try:
        named = row_name(row.value) if isinstance(row.value, dict) else None
    except BadRow:
        named = printable(str(row.value["id"]))
    return named or f"row-{row.index}"


def _lenient_messages(value: object) -> list[Message]:
    """Messages of a row that will be rejected, so that one can see what it holds.

    Where it has more markers than images, a turn's repeated markers count once, as the original reads
    them.

    Raises:
        BadConversation: there is no conversation to be found in the row.
    """
    turns = _lenient_turns(value)
    images = image_field(value) if isinstance(value, dict) else None
    n_images = len(images) if isinstance(images, list) else int(bool(images))
    if not n_images:
        return messages_from_turns(turns, 0)
    if count_markers(turns) > n_images:
        turns = list(collapse_markers(turns))
    return messages_from_turns(turns, count_markers(turns) or n_images)


def _lenient_turns(value: object) -> list[Turn]:
    listed = value.get("conversations") if isinstance(value, dict) else None
    turns = listed if isinstance(listed, list) else []
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadConversation("malformed_turn", "a turn is no object with a text `value`")
    if any(_SURROGATE.search(turn["value"]) for turn in turns):
        raise BadConversation("invalid_text", "a turn holds half a character (a lone surrogate)")
    return [Turn(cast(Role, str(turn.get("from"))), turn["value"]) for turn in turns]


def run(options: argparse.Namespace) -> int:
    """Inspects the file; bad rows are part of the answer, not a failure."""
    from rayva.model.language import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    inspector = Inspector(
        tokenizer,
        get_template(options.template, tokenizer, options.system),
        image_position=options.image_position,
        max_tokens=options.max_tokens,
        image_tokens=options.image_tokens,
        over_length=options.over_length,
        images=options.images,
        seed=options.seed,
    )
    rows = islice(read_json_rows(options.data, "DATA.json"), options.limit)
    inspected = _counted(inspector.inspect(row) for row in rows)
    if options.json:
        write_json(inspected, sys.stdout)
    else:
        write_report(inspected, sys.stdout, tokenizer, options.show, options.max_tokens)
    return 0


def _counted(rows: Iterator[Inspected]) -> Iterator[Inspected]:
    """The same rows; tells a terminal how many they are by now."""
    if not sys.stderr.isatty():
        yield from rows
        return
    with Progress("inspect", None, "rows") as progress:
        for row in rows:
            yield row
            progress.advance()


def write_json(rows: Iterable[Inspected], out: TextIO) -> None:
    """One object a line: id, prompt, input_ids (image -200), labels (ignored -100), status, reason."""
    for row in rows:
        record = {
            "id": row.row_id,
            "prompt": row.encoded.prompt,
            "input_ids": row.encoded.input_ids,
            "labels": row.encoded.labels,
            "status": row.status,
            "reason": row.reason,
        }
        out.write(json.dumps(record) + "\n")


@dataclass(slots=True)
class _Totals:
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    unsupervised: int = 0
    lengths: list[int] = field(default_factory=list)
    truncated: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def add(self, row: Inspected) -> None:
        self.rows += 1
        if row.status == "rejected":
            self.rejected[row.reason or ""] += 1
            return
        if row.status == "truncated":
            self.truncated[row.reason or ""] += 1
        if row.note:
            self.noted[row.note] += 1
        self.lengths.append(row.length)
        self.tokens += row.kept
        self.supervised += row.supervised
        self.unsupervised += not row.supervised


def write_report(
    rows: Iterable[Inspected], out: TextIO, tokenizer: PreTrainedTokenizerBase, show: int, max_tokens: int
) -> None:
    """The first `show` rows in full, the first of each reason for trouble, then figures over all."""
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    marks = ("\033[32m", "\033[0m") if colour else ("{", "}")
    totals = _Totals()
    for row in rows:
        first = row.reason and not (totals.truncated[row.reason] or totals.rejected[row.reason])
        totals.add(row)
        if totals.rows <= show or first:
            out.writelines(f"{line}\n" for line in _row_lines(row, tokenizer, marks))
    out.writelines(f"{line}\n" for line in _figures(totals, max_tokens))


def _row_lines(row: Inspected, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> Iterator[str]:
    why = f" ({row.reason}: {row.detail})" if row.reason else f" ({row.note})" if row.note else ""
    yield _printable(f"== {row.row_id}: {row.status}{why}").replace("\n", "\\n")
    yield f"   {row.length} tokens with images, {row.supervised} supervised"
    if not row.encoded.input_ids:
        return
    yield _printable(_clipped(row.encoded.prompt))
    yield "-- tokens, the supervised ones " + ("in colour" if marks[0].startswith("\033") else "in { }")
    yield _token_line(row.encoded, tokenizer, marks)
    yield ""


def _token_line(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> str:
    pieces = []
    inside = False
    for token_id, label in list(zip(encoded.input_ids, encoded.labels, strict=True))[:_SHOWN]:
        supervised = label != IGNORE_INDEX
        if supervised != inside:
            pieces.append(marks[0] if supervised else marks[1])
            inside = supervised
        pieces.append(_token_text(token_id, tokenizer))
    if inside:
        pieces.append(marks[1])
    hidden = len(encoded.input_ids) - _SHOWN
    return " ".join([*pieces, f"... and {hidden:,} more"] if hidden > 0 else pieces)


def _token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if token_id == IMAGE_TOKEN_INDEX:
        return IMAGE_PLACEHOLDER
    text: Any = tokenizer.convert_ids_to_tokens(token_id)
    return _printable(str(text)).replace("\n", "\\n")


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... and {len(text) - _SHOWN:,} characters more"


def _printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _figures(totals: _Totals, max_tokens: int) -> Iterator[str]:
    kept = len(totals.lengths)
    yield f"{totals.rows:,} rows: {kept:,} usable, {totals.rejected.total():,} rejected"
    for reason, count in totals.rejected.most_common():
        yield f"  rejected {count:,}: {reason}"
    for _, count in totals.truncated.most_common():
        yield f"  truncated {count:,}: over {max_tokens:,} tokens with images"
    for note, count in totals.noted.most_common():
        yield f"  taken {count:,}: {note}"
    if totals.unsupervised:
        yield f"  nothing is supervised in {totals.unsupervised:,} usable rows"
    if not kept:
        return
    share = 100 * totals.supervised / totals.tokens
    yield f"{totals.tokens:,} tokens with images, {totals.supervised:,} ({share:.1f} %) supervised"
    ordered = sorted(totals.lengths)
    yield f"length: shortest {ordered[0]:,}, median {ordered[kept // 2]:,}, longest {ordered[-1]:,}"
    yield from _histogram(ordered)


def _histogram(ordered: list[int]) -> Iterator[str]:
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = Counter((length - low) // width for length in ordered)
    for index in range((high - low) // width + 1):
        start = low + index * width
        bar = "#" * -(-_BAR_WIDTH * counts[index] // max(counts.values()))
        yield f"  {start:>7,} - {start + width - 1:>7,} {bar} {counts[index]:,}"
