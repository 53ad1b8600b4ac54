"""Words for the ninth of a picture that a point lies in."""

from __future__ import annotations

PHRASES = {
    "top left": "in the top left",
    "top": "at the top",
    "top right": "in the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "in the bottom left",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right",
}
"""Place names with their prepositions, row by row."""


def place_name(x: float, y: float) -> str:
    """The name of the ninth that holds (x, y), both as shares of the picture's sides in [0, 1]."""
    column, row = (min(2, max(0, int(v * 3))) for v in (x, y))
    return tuple(PHRASES)[3 * row + column]
