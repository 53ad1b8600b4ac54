"""The prompts that teachers are given: a system message and examples for each kind (paper, appendix).

A folder has one folder for each kind, with `system_message.txt` and examples in pairs: `000_caps.txt` is what
the teacher is shown, `000_conv.txt` what it should answer. That is the layout of the original's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from rayva.errors import DataError
from rayva.instruct.contexts import Context, Kind, render

FOLDERS: dict[Kind, str] = {
    "conversation": "conversation",
    "detail": "detail_description",
    "reasoning": "complex_reasoning",
}
_SHOWN, _ANSWERED = "_caps.txt", "_conv.txt"


@dataclass(frozen=True)
class KindPrompt:
    """System message and examples (shown, answered) of one kind."""

    system: str
    examples: tuple[tuple[str, str], ...]


class PromptSet:
    """The prompts of all kinds."""

    def __init__(self, kinds: Mapping[Kind, KindPrompt]) -> None:
        self._kinds = kinds

    @classmethod
    def load(cls, folder: str | None = None) -> PromptSet:
        """Reads a folder; None takes the prompts that come with Rayva.

        Raises:
            DataError: a file is missing or empty.
        """
        root: Traversable
        if folder is None:
            root = resources.files("rayva.instruct").joinpath("prompts")
        else:
            root = Path(folder).expanduser()
            if not root.is_dir():
                raise DataError(f"There is no folder of prompts {folder}", "check generation.prompts")
        return cls({kind: _read_kind(root.joinpath(name)) for kind, name in FOLDERS.items()})

    def messages(self, kind: Kind, context: Context, boxes: bool) -> tuple[dict[str, str], ...]:
        """System message, examples as turns of user and assistant, and the context to write about."""
        prompt = self._kinds[kind]
        messages = [{"role": "system", "content": prompt.system}]
        for shown, answered in prompt.examples:
            messages.append({"role": "user", "content": shown})
            messages.append({"role": "assistant", "content": answered})
        return (*messages, {"role": "user", "content": render(context, boxes)})

    def digest(self, kind: Kind) -> str:
        """sha256 (hex) of a kind's prompts."""
        return hashlib.sha256(repr(self._kinds[kind]).encode()).hexdigest()


def _read_kind(folder: Traversable) -> KindPrompt:
    system = _read(folder.joinpath("system_message.txt"))
    files = [entry.name for entry in folder.iterdir()]
    names = {name.removesuffix(end) for end in (_SHOWN, _ANSWERED) for name in files if name.endswith(end)}
    if not names:
        raise DataError(f"{folder} has no examples", "add pairs such as 000_caps.txt and 000_conv.txt")
    examples = [
        (_read(folder.joinpath(name + _SHOWN)), _read(folder.joinpath(name + _ANSWERED)))
        for name in sorted(names)
    ]
    return KindPrompt(system, tuple(examples))


def _read(file: Traversable) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompt {file} cannot be read: {error}", "check generation.prompts") from error
    if not text:
        raise DataError(f"The prompt {file} is empty", "write it, or remove its example")
    return text
