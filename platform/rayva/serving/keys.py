"""API keys: kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping

from rayva.errors import ServingError

ENVIRONMENT = "RAYVA_API_KEYS"


def key_digests(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """SHA-256 of each key in RAYVA_API_KEYS (separated by commas); empty where none is set.

    Raises:
        ServingError: a key that no client could send in a header.
    """
    keys = [key.strip() for key in environment.get(ENVIRONMENT, "").split(",")]
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()):
            raise ServingError(
                f"Key {number} of {ENVIRONMENT} holds a character that HTTP headers do not carry",
                "make keys of the letters, digits and signs of ASCII",
            )
    return tuple(_digest(key) for key in keys if key)


def allowed(authorization: str | None, digests: tuple[str, ...]) -> bool:
    """Whether an Authorization header carries one of the keys; always, where there are no keys."""
    if not digests:
        return True
    scheme, _, key = (authorization or "").partition(" ")
    presented = _digest(key.strip())
    # Every digest is compared, so that the time taken tells nothing about which one is near.
    matches = [hmac.compare_digest(presented, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
