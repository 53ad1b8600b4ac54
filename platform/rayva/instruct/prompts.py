"""Prompt sets: a system message and worked examples for each kind, as a folder in LLaVA's layout.

conversation/, detail_description/, complex_reasoning/
    system_message.txt
    NNN_caps.txt, NNN_conv.txt      what the teacher is shown, and what it should answer
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rayva.errors import DataError
from rayva.instruct.contexts import Context, Kind, render

FOLDERS: dict[Kind, str] = {
    "conversation": "conversation",
    "detail": "detail_description",
    "reasoning": "complex_reasoning",
}
SHIPPED = Path(__file__).parent / "prompts"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One kind's system message and its (context, answer) examples."""

    system: str
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of all kinds."""

    prompts: dict[Kind, Prompt]

    @classmethod
    def load(cls, folder: Path | None = None) -> PromptSet:
        """Reads a prompt folder; None is the one that ships with Rayva.

        Raises:
            DataError: a file is missing, empty or not UTF-8; the message names it.
        """
        root = SHIPPED if folder is None else Path(folder)
        return cls({kind: _read_prompt(root / name) for kind, name in FOLDERS.items()})

    def messages(self, kind: Kind, context: Context, boxes: bool) -> tuple[dict[str, str], ...]:
        """System message, the examples by turns, then the context in the last user turn."""
        prompt = self.prompts[kind]
        turns = [{"role": "system", "content": prompt.system}]
        for shown, answer in prompt.examples:
            turns.append({"role": "user", "content": shown})
            turns.append({"role": "assistant", "content": answer})
        turns.append({"role": "user", "content": render(context, boxes)})
        return tuple(turns)

    def digest(self, kind: Kind) -> str:
        """SHA-256 of all the words of `kind`, in hexadecimal."""
        prompt = self.prompts[kind]
        words = json.dumps([prompt.system, prompt.examples], ensure_ascii=True)
        return hashlib.sha256(words.encode()).hexdigest()


def _read_prompt(folder: Path) -> Prompt:
    system = _text(folder / "system_message.txt")
    stems = {path.name.rsplit("_", 1)[0] for path in folder.glob("*_caps.txt")}
    stems |= {path.name.rsplit("_", 1)[0] for path in folder.glob("*_conv.txt")}
    examples = tuple(
        (_text(folder / f"{stem}_caps.txt"), _text(folder / f"{stem}_conv.txt")) for stem in sorted(stems)
    )
    return Prompt(system, examples)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataError(
            f"the prompt file {path} cannot be read: {error.strerror or error}",
            "a prompt folder holds conversation/, detail_description/ and complex_reasoning/, each with "
            "system_message.txt and pairs NNN_caps.txt, NNN_conv.txt",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt file {path} is not UTF-8", "save it as UTF-8") from error
    if not text:
        raise DataError(f"the prompt file {path} is empty", "write its text or remove the pair")
    return text
