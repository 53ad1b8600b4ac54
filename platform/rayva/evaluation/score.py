"""Whether an answer is right, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable

from rayva.data.answer_match import find_part

_ARTICLES = {"a", "an", "the"}
MINUS = "\u2212"
"""U+2212, a sign and no punctuation."""
# The hyphen, or a dash in its place, that makes a number negative: not that of "check-in", "3-5" or "2-a".
_NEGATIVE = re.compile(rf"(?<![\w.)\]%])[-\u2013{MINUS}](?=\.?\d)")
_Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def normalise(text: str) -> str:
    """`text` without case, punctuation, articles and extra space, for comparison.

    The minus of a negative number is no punctuation; it becomes `MINUS`, however it is written.
    A text of nothing but articles keeps them, since "(A)" names a choice; so does one of nothing but
    punctuation: "#" is a name too.
    """
    folded = _NEGATIVE.sub(MINUS, unicodedata.normalize("NFKC", text).casefold())
    plain = "".join(" " if unicodedata.category(char).startswith("P") else char for char in folded)
    words = plain.split()
    telling = [word for word in words if word not in _ARTICLES]
    return " ".join(telling or words or folded.split())


def is_right(answer: str, accepted: Iterable[str], match: str = "text") -> bool:
    """Whether `answer` equals one of `accepted` in what `match` says counts. An empty answer never does."""
    if match == "text":
        given = normalise(answer)
        return given != "" and any(given == normalise(right) for right in accepted)
    part = find_part(match, answer)
    return part is not None and any(part == find_part(match, right) for right in accepted)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval (Wilson) of the probability behind `right` of `total`; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, _Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)
