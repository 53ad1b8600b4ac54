"""Secrets in URIs: masked wherever a URI is shown or kept."""

from __future__ import annotations

import re

MASK = "***"
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with the user names, passwords and tokens of every URI in it replaced by ***."""
    return _SECRET_QUERY.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", text))
