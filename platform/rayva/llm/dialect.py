"""What endpoints that speak OpenAI's chat API disagree about, learned from what they refuse."""

from __future__ import annotations

import logging
import re
from typing import Any

from rayva.llm.request import ChatRequest

_LOG = logging.getLogger(__name__)
_REFUSED = (400, 422)
_LIMIT, _OTHER_LIMIT = "max_tokens", "max_completion_tokens"
"""How the longest answer is called: OpenAI's reasoning models refuse the one, older endpoints the other."""
_SEED = re.compile(rb"\bseed\b")


class Dialect:
    """How one endpoint wants to be asked. What decides an answer, such as the temperature, never changes."""

    def __init__(self) -> None:
        self._limit_name = _LIMIT
        self._takes_seed = True

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The body of POST /chat/completions."""
        body = request.body()
        body[self._limit_name] = body.pop(_LIMIT)
        if not self._takes_seed:
            body.pop("seed", None)
        return body

    def learn(self, status: int, content: bytes, sent: dict[str, Any]) -> str | None:
        """What was refused and is done otherwise from now on; None if the refusal is about something else.

        Args:
            sent: the body that was refused.
        """
        if status not in _REFUSED:
            return None
        if _LIMIT in sent and _OTHER_LIMIT.encode() in content:
            self._limit_name = _OTHER_LIMIT
            return _LIMIT
        if "seed" in sent and _SEED.search(content):
            if self._takes_seed:
                _LOG.warning("the endpoint takes no seed; it is asked without one")
            self._takes_seed = False
            return "seed"
        return None
