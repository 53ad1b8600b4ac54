"""Numbers that stand for something other than a word in token sequences. Imports nothing."""

from __future__ import annotations

from typing import Final

IMAGE_TOKEN_INDEX: Final = -200
"""Stands for one image in `input_ids`; replaced by its visual tokens later."""
IGNORE_INDEX: Final = -100
"""Label of a position that is not supervised."""
