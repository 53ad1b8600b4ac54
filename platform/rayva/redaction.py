"""Secrets in URIs: masked wherever a URI is shown or kept."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

MASK = "***"
# A password may hold "/" and "@", where it should hold %2F and %40: from "user:" on, all to the last "@" is
# taken for it. Only a number that "/" follows is a port, and an "@" after it a part of the path.
_USERINFO = re.compile(
    r"(?<=://) (?: [^/\s:@]* : (?! \d+ (?: [/?\#\s] | $)) (?: (?!://) \S)* | [^/\s]* ) @", re.VERBOSE
)
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|passw|pwd|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with the user names, passwords and tokens of every URI in it replaced by ***."""
    return _SECRET_QUERY.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", text))


def holds_secret(uri: str) -> bool:
    """Whether `uri` has a part that must not be kept. A database's URI may name its user.

    A server's may not: a token can stand in the user's place. Of fsspec's chains (`zip://x::http://...`),
    each link is looked at by itself.
    """
    return any(_link_holds_secret(link) for link in uri.split("::"))


def _link_holds_secret(uri: str) -> bool:
    parts = urlsplit(uri)
    # github://ORGANISATION:REPOSITORY@COMMIT/... only looks like a password.
    if parts.scheme == "github" or (parts.scheme not in ("http", "https") and parts.password is None):
        uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return redact(uri) != uri
