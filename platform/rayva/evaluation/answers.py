"""Answers on the storage: kept as they come, so that no question is ever asked twice.

An answer belongs to the digest of exactly what was asked: the model, the conversation, the pictures'
names or bytes, and the sampling. A changed prompt is another question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayva.evaluation.tasks.base import Item, digest, prompt_rows
from rayva.storage import Storage
from rayva.text.conversation import IMAGE, ImageSlot, Message

PARTS = "parts"


@dataclass(frozen=True, slots=True)
class Sampled:
    """How answers are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """An item of a task as it is put to the model."""

    task: str
    item: Item
    sampled: Sampled
    key: str
    """Digest of all that decides the answer."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back: the answer, or the reason why the question could not be asked."""

    task: str
    item_id: str
    key: str
    text: str = ""
    error: str = ""


def asked(task: str, item: Item, sampled: Sampled, model: Mapping[str, Any]) -> Asked:
    """The item with its key; `model` identifies the model (JSON data)."""
    pictures = [
        picture.uri if picture.content is None else hashlib.sha256(picture.content).hexdigest()
        for picture in item.pictures
    ]
    what = [dict(model), prompt_rows(item.messages), pictures, asdict(sampled), item.then]
    return Asked(task, item, sampled, digest(what))


class AnswerStore:
    """The answers under a storage root, in small files that are written whole or not at all."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add(self, rows: Sequence[Answered]) -> None:
        """Keeps answers; when this returns, they are on the storage."""
        name = digest([row.key for row in rows])[:32]
        self._storage.write_json(f"{PARTS}/{name}.json", [asdict(row) for row in rows])

    def load(self, wanted: Iterable[Asked]) -> dict[str, Answered]:
        """Kept answers to the wanted questions, by key; failures only where there is no answer."""
        keys = {one.key for one in wanted}
        found: dict[str, Answered] = {}
        # What a killed process was writing lies beside them under another ending.
        for name in (name for name in self._storage.list(PARTS) if name.endswith(".json")):
            for raw in self._storage.read_json(f"{PARTS}/{name}"):
                row = Answered(**raw)
                if row.key in keys and (row.key not in found or found[row.key].error):
                    found[row.key] = row
        return found


def pack_messages(messages: Sequence[Message]) -> str:
    """Messages as JSON; an image's place is null, which no text can be."""
    rows = [[m.role, [None if isinstance(part, ImageSlot) else part for part in m.content]] for m in messages]
    return json.dumps(rows)


def unpack_messages(text: str) -> list[Message]:
    """What `pack_messages` has packed."""
    return [
        Message(role, tuple(IMAGE if part is None else part for part in content))
        for role, content in json.loads(text)
    ]


def batches(questions: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Batches of questions of about the same length that are sampled alike, the longest first.

    Little padding; and what needs the most memory comes at the start, not after an hour.
    """
    groups: dict[Sampled, list[Asked]] = {}
    for one in questions:
        groups.setdefault(one.sampled, []).append(one)
    cut = []
    for group in groups.values():
        ordered = sorted(group, key=lambda one: (len(one.item.pictures), len(one.item.prompt), one.key))
        cut += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return sorted(cut, key=lambda batch: (-_length(batch), batch[0].key))


def _length(batch: Sequence[Asked]) -> int:
    return max(len(one.item.prompt) + 1000 * len(one.item.pictures) for one in batch)
