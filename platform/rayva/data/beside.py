"""Where the images lie that a file of rows names relative to itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from rayva.data import caption_rows, llava_json
from rayva.data.json_rows import read_json_rows
from rayva.data.locations import absolute, is_local, join, parent, split_chain
from rayva.data.quarantine import BadRow

Form = Literal["llava", "captions"]
Places = frozenset[tuple[str, str]]
"""(folder, file ending) pairs: what else lies there, a run's own files for example, is no input."""


@functools.lru_cache(maxsize=64)
def image_places(uri: str, setting: str, form: Form, digest: str) -> Places:
    """Folders and endings of the images that usable rows of the file `uri` name; none for bytes in tables.

    Args:
        digest: of the file's content. The same file is asked about several times in a run, and is read once.

    Raises:
        DataError: the file cannot be read.
    """
    root = parent(absolute(uri))
    places: set[tuple[str, str]] = set()
    for name in _names_in_json(uri, setting) if form == "llava" else _names_in_captions(uri):
        if "://" in name and not is_local(name):
            continue  # elsewhere, where nothing may be listed
        image = join(root, name).removeprefix("file://")
        places.add((parent(image), PurePosixPath(split_chain(image)[0]).suffix))
    return frozenset(places)


def _names_in_json(uri: str, setting: str) -> Iterator[str]:
    for row in read_json_rows(uri, setting):
        try:
            yield from llava_json.parse_row(row.value).images
        except BadRow:
            continue  # the data step tells of it


def _names_in_captions(uri: str) -> Iterator[str]:
    for _, value, _ in caption_rows.read_rows(uri).values:
        try:
            row = caption_rows.parse_row(value)
        except BadRow:
            continue  # the data step tells of it
        if row.image is None:
            return  # a table that holds its images: they need not be read for this
        yield row.image
