"""Words for the ninth of a picture that a point lies in."""

from __future__ import annotations

PHRASES = {
    f"{row} {column}": f"in the {row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
}
"""Place names with their prepositions, row by row."""


def place_name(x: float, y: float) -> str:
    """The name of the ninth that holds (x, y), both as shares of the picture's sides in [0, 1]."""
    column, row = (min(2, max(0, int(v * 3))) for v in (x, y))
    return tuple(PHRASES)[3 * row + column]
