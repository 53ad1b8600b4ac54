"""Record schemas: every table that one step writes and another reads is declared here.

Boxes are normalised to [0, 1], origin at the top left, as (x1, y1, x2, y2) (paper, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

Split = Literal["train", "validation", "test"]
Role = Literal["human", "gpt"]

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image's place in LLaVA conversations."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One object of an image: its category and its normalised box."""

    category: str
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image with what is known about it.

    Either `content` (the encoded bytes) or `uri` (a local path or fsspec URI) is set: built-in
    datasets and Parquet inputs carry bytes, folders and LLaVA JSON point at files.
    """

    image_id: str
    split: Split
    uri: str | None = None
    content: bytes | None = None
    captions: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `<image>` in a human turn marks the place of the next image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample in LLaVA's form: images and a conversation about them.

    `kind` tells where it comes from: "caption" (stage 1), or "conversation", "detail", "complex"
    (the paper's three response types), or "user" for samples from the user's own LLaVA JSON.
    `dataset` is the name of its dataset in a mix, whose samples lie together; empty without a mix.
    """

    sample_id: str
    image_ids: tuple[str, ...]
    turns: tuple[Turn, ...]
    kind: str = "user"
    dataset: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question about one image, for the promotion gate.

    `task` groups questions for scoring ("grounding" is what the gate reads); `kind` is finer, for
    breakdowns. An answer is right if it equals one of `accepted` in what `match` says counts
    (`rayva.data.answer_match`).
    """

    question_id: str
    image_id: str
    task: str
    kind: str
    question: str
    accepted: tuple[str, ...]
    match: str = "text"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was quarantined: where it came from, a short machine-readable reason, details."""

    source: str
    row_id: str
    reason: str
    detail: str = field(default="")


_INSTANCE = pa.struct([("category", pa.string()), ("bbox", pa.list_(pa.float64(), 4))])

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("uri", pa.string()),
        ("content", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("instances", pa.list_(_INSTANCE)),
    ]
)
SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_ids", pa.list_(pa.string())),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("kind", pa.string()),
        ("dataset", pa.string()),
    ]
)
QUESTIONS = pa.schema(
    [
        ("question_id", pa.string()),
        ("image_id", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("accepted", pa.list_(pa.string())),
        ("match", pa.string()),
    ]
)
REJECTED = pa.schema(
    [
        ("source", pa.string()),
        ("row_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
