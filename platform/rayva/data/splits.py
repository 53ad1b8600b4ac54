"""Splits and ids that depend on nothing but the names of things."""

from __future__ import annotations

import hashlib


def share_of(name: str, salt: str = "") -> float:
    """A number in [0, 1) that is a fixed, evenly spread function of `name`."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out(name: str, fraction: float) -> bool:
    """Whether the thing called `name` belongs to the held-out share."""
    return share_of(name, "split") < fraction


class UniqueIds:
    """Gives every row an id of its own: the first bearer keeps it, later ones get `#2`, `#3`, ..."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def claim(self, wanted: str) -> str:
        """`wanted` if it is free, else the next free variation of it."""
        name = wanted
        while name in self._taken:
            number = self._next.get(wanted, 2)
            self._next[wanted] = number + 1
            name = f"{wanted}#{number}"
        self._taken.add(name)
        return name
