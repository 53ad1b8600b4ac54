"""What is asked of a chat model, and what it answers."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

MOST_TOKENS = 10**9
"""More than any call can take; what an endpoint counts beyond is a fault, and no column of ours holds it."""


@dataclass(frozen=True)
class Sampling:
    """How the answer is drawn; None leaves a setting to the endpoint."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 1024
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One call: `messages` as the chat API takes them.

    `attempt` tells calls apart that are alike but for being asked again, because the answer to the one
    before could not be used.
    """

    model: str
    messages: tuple[dict[str, Any], ...]
    sampling: Sampling = Sampling()
    attempt: int = 0

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over all that decides the answer."""
        what = {
            "model": self.model,
            "messages": self.messages,
            "sampling": asdict(self.sampling),
            "attempt": self.attempt,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def prompt_digest(self) -> str:
        """sha256 (hex) over the messages alone."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """The body of POST /chat/completions."""
        drawn = {key: value for key, value in asdict(self.sampling).items() if value is not None}
        return {"model": self.model, "messages": list(self.messages), **drawn}

    def estimated_prompt_tokens(self) -> int:
        """About how many tokens the messages are: a token for four bytes, and a few for each message.

        Good enough for limits and forecasts; what is counted in the end is what the endpoint says.
        """
        return sum(len(str(message.get("content", "")).encode()) // 4 + 5 for message in self.messages) + 3

    def most_prompt_tokens(self) -> int:
        """More tokens than the messages should be.

        A token is at least a byte or so long, and seldom shorter than three: half as many again as the
        estimate leaves room for prompts that are denser than English.
        """
        return 3 * self.estimated_prompt_tokens() // 2


@dataclass(frozen=True)
class ChatAnswer:
    """An answer; token counts are the endpoint's own, or estimates where it tells none.

    `seconds` is how long the call took, `created` when it ended (seconds since the epoch).
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str
    seconds: float
    created: float = 0.0
    cached: bool = False


class LLMError(Exception):
    """A call that was not answered."""


class PassingError(LLMError):
    """The same call may succeed later; `retry_after` is the endpoint's own advice in seconds.

    `billed`: the endpoint may have done the work, and will want to be paid for it. `busy`: it has too many
    calls, and did not look at this one. `reached`: something answers, or at least listens, at the endpoint's
    address.
    """

    def __init__(
        self,
        what: str,
        retry_after: float | None = None,
        billed: bool = False,
        busy: bool = False,
        reached: bool = True,
    ) -> None:
        super().__init__(what)
        self.retry_after, self.billed, self.busy, self.reached = retry_after, billed, busy, reached


class PermanentError(LLMError):
    """The same call would fail again; `fatal` if every other call would, too (a wrong key, no such model)."""

    def __init__(self, what: str, fatal: bool = False) -> None:
        super().__init__(what)
        self.fatal = fatal


def read_completion(body: object, request: ChatRequest, seconds: float) -> ChatAnswer:
    """The answer in the JSON that /chat/completions returned.

    Raises:
        PassingError: it has not the API's form.
    """
    try:
        if not isinstance(body, dict):
            raise TypeError("no object")
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        text = _whole(_content(choice["message"]))
        reason = choice.get("finish_reason")
        return ChatAnswer(
            text=text,
            finish_reason=None if reason is None else _whole(str(reason)),
            prompt_tokens=_count(usage.get("prompt_tokens")) or request.estimated_prompt_tokens(),
            completion_tokens=_count(usage.get("completion_tokens")) or estimated_tokens(text),
            model=_whole(str(body.get("model") or request.model)),
            seconds=seconds,
            created=time.time(),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PassingError(f"not a chat completion: {error!r}", billed=True) from error


def estimated_tokens(text: str) -> int:
    """About how many tokens an answer is, where the endpoint does not tell."""
    return len(text.encode()) // 4 + 1


def _content(message: dict[str, Any]) -> str:
    """The words of a message: text, or parts of text; those of a refusal where that is all there is."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    content = content or message.get("refusal") or ""
    if not isinstance(content, str):
        raise TypeError("the content is no text")
    return content


def told_status(body: object) -> int | None:
    """The HTTP status of an error that came with status 200, as routers to several endpoints send it."""
    error = body.get("error") if isinstance(body, dict) and "choices" not in body else None
    status = error.get("code") if isinstance(error, dict) else None
    return status if type(status) is int and 400 <= status < 600 else None


def _whole(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON can hold but no file in UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int:
    """A number of tokens; 0 where the endpoint tells none, or one that cannot be."""
    count = int(value or 0)
    return count if 0 < count <= MOST_TOKENS else 0
