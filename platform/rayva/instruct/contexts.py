"""Contexts: what a teacher is told about one image, its captions and boxes (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rayva.data.coco import read_coco, record_of_row
from rayva.data.json_rows import read_json_rows
from rayva.data.quarantine import BadRow
from rayva.data.schema import ImageRecord, Instance, Rejected

Kind = Literal["conversation", "detail", "reasoning"]
"""The paper's three response types."""

__all__ = ["BadContext", "Context", "Instance", "Kind", "from_coco", "from_images", "read_contexts", "render"]


@dataclass(frozen=True, slots=True)
class Context:
    """One image in symbols; boxes are (x1, y1, x2, y2), normalised to [0, 1]."""

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...]


@dataclass(frozen=True, slots=True)
class BadContext:
    """A row that gives no context: its number or id, and why."""

    row: str
    reason: str


def read_contexts(path: str) -> Iterator[Context | BadContext]:
    """Reads JSON Lines of {id, image, captions, instances: [{category, bbox}]}.

    Raises:
        DataError: the file is missing or cannot be read at all.
    """
    seen: set[str] = set()
    for row in read_json_rows(path, "captions with boxes"):
        name = f"row-{row.index}"
        try:
            if row.error or not isinstance(row.value, dict):
                raise BadRow("not_json" if row.error else "not_an_object", row.error)
            record = record_of_row(row.value, None, "train")
            own = row.value.get("id")
            name = str(own) if isinstance(own, (str, int)) and str(own).strip() else record.image_id
            if name in seen:
                raise BadRow("duplicate_id", name)
        except BadRow as bad:
            yield BadContext(name, f"{bad.reason}: {bad.detail}" if bad.detail else bad.reason)
            continue
        seen.add(name)
        yield Context(name, record.image_id, record.captions, record.instances)


def from_coco(captions_json: str, instances_json: str | None) -> Iterator[Context | BadContext]:
    """Contexts of COCO's annotation files; crowd regions are left out.

    Raises:
        DataError: a file is missing, not JSON, or not in COCO's form.
    """
    rejects: list[Rejected] = []
    yield from from_images(read_coco(captions_json, instances_json, None, "train", rejects))
    for bad in rejects:
        yield BadContext(bad.row_id, f"{bad.reason}: {bad.detail}" if bad.detail else bad.reason)


def from_images(records: Iterable[ImageRecord]) -> Iterator[Context | BadContext]:
    """Contexts of a built-in dataset's images."""
    for record in records:
        if any(caption.strip() for caption in record.captions):
            yield Context(record.image_id, record.image_id, record.captions, record.instances)
        else:
            yield BadContext(record.image_id, "no_caption")


def render(context: Context, boxes: bool) -> str:
    """The words that the teacher reads: a caption a line, then, with `boxes`, a line for each object."""
    text = "\n".join(" ".join(caption.split()) for caption in context.captions)
    if not boxes or not context.instances:
        return text
    lines = (f"{i.category}: [{', '.join(f'{v:.3f}' for v in i.bbox)}]" for i in context.instances)
    return text + "\n\n" + "\n".join(lines)
