"""Runs a tokenizer's chat template: somebody else's code, which transformers sandboxes but does not end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_STEPS = 5_000_000
"""Lines of its own that a template may run; thousands are usual, even for long conversations."""
_TEMPLATE_FILE = "<template>"
"""What Jinja calls the source of a template that comes from no file."""


class EndlessTemplate(Exception):
    """A chat template that does not come to its end."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    generation: bool,
    chat_template: str | None = None,
) -> str:
    """What a chat template, the tokenizer's own or the one given, writes for `messages`.

    Raises:
        EndlessTemplate: it runs on and on: the sandbox bounds one loop, not loops within loops.
        Exception: whatever its code and the sandbox raise.
    """
    with _bounded(_MOST_STEPS):
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=chat_template, add_generation_prompt=generation, tokenize=False
        )
    return str(text)


@contextmanager
def _bounded(steps: int) -> Iterator[None]:
    """Ends templates of this thread after so many lines: counted, since a clock depends on the machine."""
    left = steps

    def on_line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise EndlessTemplate(f"it was stopped after {steps:,} steps, as it may never end")
        return on_line

    def on_call(frame: FrameType, event: str, arg: object) -> Any:
        return on_line if frame.f_code.co_filename == _TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
