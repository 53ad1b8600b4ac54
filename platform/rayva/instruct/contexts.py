"""What a language-only teacher sees in place of a picture: captions and boxes (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rayva.data.coco import Objects, coco_annotations, read_lists
from rayva.data.json_rows import read_json_rows
from rayva.data.quarantine import BadRow, checked_text
from rayva.data.schema import ImageRecord, Instance

Kind = Literal["conversation", "detail", "reasoning"]


@dataclass(frozen=True)
class Context:
    """The symbolic representation of one image.

    Attributes:
        image: its file name, or its id in a built-in dataset.
        crowds: categories of which there are more than boxes, because a region holds many of them.
        empty_boxes: how many boxes were left out because they have no area.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...] = ()
    crowds: tuple[str, ...] = ()
    empty_boxes: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class BadContext:
    """A row that cannot be used."""

    row: str
    reason: str
    detail: str = ""


def read_contexts(uri: str) -> Iterator[Context | BadContext]:
    """Reads JSON Lines of {id, image, captions, instances: [{category, bbox}]}; boxes are normalised.

    `id` may be missing: it is then the image's name without its ending.

    Raises:
        DataError: the file is missing or not JSON.
    """
    for row in read_json_rows(uri, "generation.input"):
        try:
            if row.error or not isinstance(row.value, dict):
                raise BadRow("not_json" if row.error else "not_an_object", row.error)
            yield _context(row.value)
        except BadRow as error:
            yield BadContext(f"row-{row.index}", error.reason, error.detail)


def _context(row: dict[str, Any]) -> Context:
    image = row.get("image")
    if not isinstance(image, str) or not image:
        raise BadRow("bad_image_field", "the row has no `image`")
    captions, objects = read_lists(row.get("captions"), row.get("instances") or [])
    name = row.get("id")
    if name is None:
        name = image.rpartition("/")[2].rpartition(".")[0] or image
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise BadRow("bad_id", f"{name!r} is no id")
    return _complete(str(name), image, captions, objects)


def from_coco(captions: str, instances: str | None) -> Iterator[Context | BadContext]:
    """Joins COCO's captions_*.json and instances_*.json by image.

    Raises:
        DataError: a file is missing, not JSON, or not in COCO's form.
    """
    for image in coco_annotations(captions, instances):
        try:
            name = image.image.get("file_name")
            if not isinstance(name, str) or not name:
                raise BadRow("bad_image_field", "the image has no file_name")
            yield _complete(name.rpartition(".")[0], name, image.captions, image.objects())
        except BadRow as error:
            yield BadContext(str(image.image.get("id")), error.reason, error.detail)


def from_images(records: Iterable[ImageRecord]) -> Iterator[Context | BadContext]:
    """The contexts of a built-in dataset."""
    for record in records:
        try:
            safe = record.image_id.replace("/", "-")
            yield _complete(safe, record.image_id, list(record.captions), Objects(list(record.instances)))
        except BadRow as error:
            yield BadContext(record.image_id, error.reason, error.detail)


def _complete(name: str, image: str, captions: list[Any], objects: Objects) -> Context:
    texts = [" ".join(caption.split()) for caption in captions if isinstance(caption, str)]
    kept = tuple(checked_text(text) for text in texts if text)
    if not kept:
        raise BadRow("no_caption", f"{image} has no caption")
    return Context(
        checked_text(name),
        checked_text(image),
        kept,
        tuple(objects.instances),
        tuple(sorted(objects.crowds)),
        objects.empty,
    )


def render(context: Context, boxes: bool) -> str:
    """The context as the teacher reads it: a caption a line; then, with `boxes`, an empty line and an object
    a line, with the corners (x1, y1, x2, y2) in [0, 1] to three decimals.
    """
    lines = list(context.captions)
    if boxes and context.instances:
        lines.append("")
        for instance in context.instances:
            corners = ", ".join(f"{value:.3f}" for value in instance.bbox)
            lines.append(f"{instance.category}: [{corners}]")
    return "\n".join(lines)
