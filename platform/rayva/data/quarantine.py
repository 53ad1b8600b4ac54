"""Rows that cannot be used: kept with a reason, counted, never silently dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rayva.data.schema import Rejected
from rayva.redaction import redact

_DETAIL_LENGTH = 500


class BadRow(Exception):
    """A row that cannot be used; `reason` is short and machine-readable, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def rejected(source: str, row_id: str, error: BadRow) -> Rejected:
    """The quarantine's entry for a bad row of `source`. Secrets are masked: a row may name signed URIs."""
    source, row_id, detail = (redact(printable(text)) for text in (source, row_id, error.detail))
    return Rejected(source, row_id, error.reason, detail[:_DETAIL_LENGTH])


def printable(text: str) -> str:
    """`text` with what UTF-8 cannot hold (lone surrogates) spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def checked_text(text: str) -> str:
    """`text` itself; BadRow "invalid_text" where UTF-8, and so any table, cannot hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid_text", f"text that UTF-8 cannot hold: {error.reason}") from error
    return text


def count_reasons(rows: Iterable[Rejected]) -> dict[str, int]:
    """Number of quarantined rows by reason, the most frequent first."""
    return dict(Counter(row.reason for row in rows).most_common())
