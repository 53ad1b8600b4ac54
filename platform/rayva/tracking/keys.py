"""Names of params and metrics that MLflow takes, made of names that people choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_Value = TypeVar("_Value")
_MARKS = frozenset("_-./ :")
_LONGEST = 240
"""MLflow takes 250; the rest is for a number."""


def with_clean_keys(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """`values` under names that MLflow takes; those that become alike are numbered."""
    cleaned: dict[str, _Value] = {}
    for name, value in values.items():
        key = clean_key(name)
        number = 1
        while key in cleaned:
            number += 1
            key = f"{clean_key(name)} {number}"
        cleaned[key] = value
    return cleaned


def clean_key(name: str) -> str:
    """`name` with "_" for what MLflow refuses: most marks, and parts that a path would lose (".", "..")."""
    plain = "".join(char if char.isalnum() or char in _MARKS else "_" for char in name[:_LONGEST])
    path = "/".join("_" if part in ("", ".", "..") else part for part in plain.split("/"))
    return "_" + path[1:] if path.startswith("..") else path  # it seems to lead out of a folder
