"""COCO captions and boxes as image records: the symbolic representation that teachers read.

Two forms: COCO's own annotation files (captions_*.json with instances_*.json), and JSON Lines of
{id, image, captions, instances: [{category, bbox}]} with boxes that are normalised already.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayva.data.json_rows import read_json_rows
from rayva.data.locations import ImageFolder, open_input
from rayva.data.quarantine import BadRow, checked_text, rejected
from rayva.data.schema import ImageRecord, Instance, Rejected, Split
from rayva.errors import DataError

Box = tuple[float, float, float, float]
MAX_PIXELS = 1e7
"""No picture has a longer side; this also keeps NaN and infinity out."""
_FAR_OUTSIDE = 2.0
"""A normalised box may reach over the picture's edge a little; such a coordinate is one in pixels."""


class EmptyBox(BadRow):
    """A box without an area. The picture's other boxes are none the worse for it."""


def read_coco(
    captions: str, instances: str | None, images: str, split: Split, rejects: list[Rejected]
) -> Iterator[ImageRecord]:
    """Joins COCO's captions and instances by image.

    Crowd regions are left out, because their boxes cover several objects. An image without usable
    annotations, or whose file is missing, is added to `rejects`; so is, as `empty_box`, one that has boxes
    without an area, though it is kept without them.

    Args:
        captions, instances: paths or URIs of the annotation files; boxes are optional.
        images: the folder that holds the pictures.

    Raises:
        DataError: a file is missing, not JSON, or not in COCO's form.
    """
    folder = ImageFolder(images)
    for annotated in coco_annotations(captions, instances):
        row_id = str(annotated.image.get("id"))
        try:
            name = annotated.image.get("file_name")
            if not isinstance(name, str):
                raise BadRow("bad_image_field", "the image has no file_name")
            objects = annotated.objects()
            record = _complete(name, tuple(annotated.captions), objects.instances, folder, split)
            _tell_empty(objects, captions, row_id, rejects)
            yield record
        except BadRow as error:
            rejects.append(rejected(captions, row_id, error))


@dataclass
class Objects:
    """The objects of a picture, as far as boxes can tell.

    Attributes:
        crowds: categories of which a region holds many more.
        empty: number of boxes that were left out because they have no area; COCO has some.
    """

    instances: list[Instance] = field(default_factory=list)
    crowds: set[str] = field(default_factory=set)
    empty: int = 0


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of COCO's annotation files with its raw annotations."""

    image: dict[str, Any]
    captions: list[str]
    boxes: list[dict[str, Any]]
    names: dict[str, str]
    """Category names by id."""

    def objects(self) -> Objects:
        """Its objects. Raises `BadRow` for a bad box or category."""
        found = Objects()
        sides = self.image.get("width"), self.image.get("height")
        for annotation in self.boxes:
            name = self.names.get(str(annotation.get("category_id")))
            if annotation.get("iscrowd"):
                found.crowds |= {checked_text(name)} if name is not None else set()
                continue
            if name is None:
                raise BadRow("unknown_category", f"category_id {annotation.get('category_id')!r}")
            try:
                box = normalise_box(annotation.get("bbox"), *sides)
            except EmptyBox:
                found.empty += 1
            else:
                found.instances.append(Instance(checked_text(name), box))
        return found


def coco_annotations(captions: str, instances: str | None) -> Iterator[AnnotatedImage]:
    """Joins COCO's captions and instances by image.

    Raises:
        DataError: a file is missing, not JSON, or not in COCO's form.
    """
    listed, captions_of = _annotations(captions, "captions")
    boxes_of: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, str] = {}
    sizes: dict[str, dict[str, Any]] = {}
    if instances is not None:
        more, boxes_of = _annotations(instances, "instances")
        names = {str(c.get("id")): str(c.get("name")) for c in _section(instances, more, "categories")}
        if "images" in more:
            sizes = {str(image.get("id")): image for image in _section(instances, more, "images")}
    for image in _section(captions, listed, "images"):
        key = str(image.get("id"))
        told = (annotation.get("caption") for annotation in captions_of.get(key, ()))
        texts = [text.strip() for text in told if isinstance(text, str)]
        # Files of captions alone may leave the size out, which boxes need.
        yield AnnotatedImage({**sizes.get(key, {}), **image}, texts, boxes_of.get(key, []), names)


def read_caption_boxes(uri: str, images: str, split: Split, rejects: list[Rejected]) -> Iterator[ImageRecord]:
    """Reads JSON Lines of {id, image, captions, instances} with normalised boxes.

    Raises:
        DataError: the file is missing or not JSON.
    """
    folder = ImageFolder(images)
    for row in read_json_rows(uri, "captions with boxes"):
        try:
            if row.error or not isinstance(row.value, dict):
                raise BadRow("not_json" if row.error else "not_an_object", row.error)
            record, objects = _record_of_row(row.value, folder, split)
            _tell_empty(objects, uri, f"row-{row.index}", rejects)
            yield record
        except BadRow as error:
            rejects.append(rejected(uri, f"row-{row.index}", error))


def normalise_box(bbox: object, width: object, height: object) -> Box:
    """COCO's [x, y, width, height] in pixels as (x1, y1, x2, y2) in [0, 1], clipped to the picture.

    Raises:
        EmptyBox: its width or height is 0.
        BadRow: it is no box, or wholly outside.
    """
    sides = [_number(v) for v in (width, height)]
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or min(sides) <= 0:
        raise BadRow("bad_box", f"{bbox!r} in a picture of {width!r} x {height!r}")
    x, y, w, h = (_number(v) for v in bbox)
    if min(w, h) == 0:
        raise EmptyBox("bad_box", f"{bbox!r} has no area")
    return _valid((x / sides[0], y / sides[1], (x + w) / sides[0], (y + h) / sides[1]))


def read_box(box: object) -> Box:
    """A normalised box of a JSON row as (x1, y1, x2, y2), clipped to the picture.

    Raises:
        EmptyBox: its width or height is 0.
        BadRow: it is no box, or wholly outside.
    """
    if not isinstance(box, list) or len(box) != 4:
        raise BadRow("bad_box", f"{box!r} is no box")
    x1, y1, x2, y2 = (_number(v) for v in box)
    if max(map(abs, (x1, y1, x2, y2))) > _FAR_OUTSIDE:
        raise BadRow("bad_box", f"{box!r} is in pixels; give corners (x1, y1, x2, y2) from 0 to 1")
    if min(x2 - x1, y2 - y1) == 0:
        raise EmptyBox("bad_box", f"{box!r} has no area")
    return _valid((x1, y1, x2, y2))


def _record_of_row(row: dict[str, Any], folder: ImageFolder, split: Split) -> tuple[ImageRecord, Objects]:
    if not isinstance(row.get("image"), str):
        raise BadRow("bad_image_field", "the row has no `image`")
    captions, objects = read_lists(row.get("captions"), row.get("instances", []))
    texts = tuple(caption.strip() for caption in captions if isinstance(caption, str))
    return _complete(row["image"], texts, objects.instances, folder, split), objects


def read_lists(captions: object, instances: object) -> tuple[list[Any], Objects]:
    """`captions` and `instances` of a JSON row, the boxes normalised already; else `BadRow`."""
    if not isinstance(captions, list) or not isinstance(instances, list):
        raise BadRow("malformed_row", "`captions` and `instances` must be lists")
    found = Objects()
    for instance in instances:
        if not isinstance(instance, dict) or not isinstance(instance.get("category"), str):
            raise BadRow("unknown_category", f"{instance!r} has no category")
        name = checked_text(instance["category"])
        if instance.get("iscrowd"):
            found.crowds.add(name)
            continue
        try:
            found.instances.append(Instance(name, read_box(instance.get("bbox"))))
        except EmptyBox:
            found.empty += 1
    return captions, found


def _tell_empty(objects: Objects, source: str, row_id: str, rejects: list[Rejected]) -> None:
    if objects.empty:
        error = BadRow("empty_box", f"{objects.empty} boxes without an area were left out")
        rejects.append(rejected(source, row_id, error))


def _complete(
    name: str, captions: tuple[str, ...], instances: list[Instance], folder: ImageFolder, split: Split
) -> ImageRecord:
    texts = tuple(checked_text(text) for text in captions if text)
    if not texts:
        raise BadRow("no_caption", f"{name} has no caption")
    return ImageRecord(name, split, folder.resolve(name), captions=texts, instances=tuple(instances))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("bad_box", f"{value!r} is no number")
    if not -MAX_PIXELS < value < MAX_PIXELS:
        raise BadRow("bad_box", "a coordinate is out of all proportion")
    return float(value)


def _valid(box: Box) -> Box:
    x1, y1, x2, y2 = (min(1.0, max(0.0, v)) for v in box)
    if not (x1 < x2 and y1 < y2):
        raise BadRow("bad_box", f"{box} has no area inside the picture")
    return (x1, y1, x2, y2)


def _annotations(uri: str, what: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    with open_input(uri, f"COCO {what}") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{uri} is not JSON: {error}", f"give COCO's {what} file") from error
    if not isinstance(content, dict):
        raise DataError(f"{uri} is no COCO file", f"give COCO's {what} file")
    by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in _section(uri, content, "annotations"):
        by_image[str(annotation.get("image_id"))].append(annotation)
    return content, by_image


def _section(uri: str, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    section = content.get(name)
    if not isinstance(section, list) or not all(isinstance(item, dict) for item in section):
        raise DataError(f"{uri} has no list `{name}`", "give an annotation file in COCO's form")
    return section
