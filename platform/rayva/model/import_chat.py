"""Which conversation template an imported checkpoint was trained with, as far as its files tell."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayva.errors import RayvaError
from rayva.model.checkpoint import read_json
from rayva.model.folder import ConversationSettings
from rayva.model.import_language import first_line
from rayva.text.chat_rendering import render_chat
from rayva.text.conversation import IMAGE, Message
from rayva.text.templates import Template, get_template

BUILT_IN = ("v1", "v0", "llama_2", "chatml", "plain")
DEFAULT = "v1"
MARKERS = ("<im_start>", "<im_end>")
"""Tokens around each image, where a checkpoint was trained with `mm_use_im_start_end`."""
_QUESTION = "What is in it?"
_V0_PAD = "[PAD]"


def of_chat_template(
    tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[ConversationSettings | None, str]:
    """The template that writes what a Hugging Face checkpoint's chat template writes, and how it is known.

    None where there is no chat template, or none of Rayva's writes the same.
    """
    chat_template, source = _chat_template(tokenizer, folder)
    if chat_template is None:
        return None, "the checkpoint has no chat template"
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    try:
        text = render_chat(tokenizer, [{"role": "user", "content": content}], True, chat_template)
    except Exception as error:  # noqa: BLE001 (the template's code is anybody's)
        why = first_line(error)
        return None, f"the chat template in {source} fails on a question about a picture: {why}"
    # Rayva's exports write a space where some tokenizers need one to begin a text.
    text = text.removeprefix(tokenizer.bos_token or "").removeprefix(" ")
    text = text.replace("<image> \n", "<image>\n")
    markers = MARKERS if "".join((MARKERS[0], "<image>", MARKERS[1])) in text else None
    if markers:
        text = text.replace(markers[0], "").replace(markers[1], "")
    for name in BUILT_IN:
        found, system = _system_in(text, name, tokenizer)
        if found:
            return ConversationSettings(
                name, system, markers
            ), f"it writes what the chat template in {source} writes"
    if _written(get_own(tokenizer), tokenizer) == text:
        return ConversationSettings("tokenizer", None, markers), f"the chat template in {source} itself"
    return None, f"the chat template in {source} is none of Rayva's"


def get_own(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's own chat template, if it has one that works with plain text."""
    try:
        return get_template("tokenizer", tokenizer=tokenizer, system=None)
    except RayvaError:
        return None


def of_original(
    raw: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[ConversationSettings, str]:
    """The template of an original checkpoint, which does not record it.

    Rayva's own exports do. Else LLaVA v0 is known by the token `[PAD]` that its training added.
    """
    own = raw.get("rayva_conversation")
    if isinstance(own, dict) and own.get("template") in (*BUILT_IN, "tokenizer"):
        system = own.get("system")
        if system is None or isinstance(system, str):
            return ConversationSettings(own["template"], system), "config.json records it"
    if _V0_PAD in tokenizer.get_added_vocab():
        return ConversationSettings("v0", None), f"the tokenizer has the token {_V0_PAD} of LLaVA v0"
    return ConversationSettings(DEFAULT, None), "LLaVA checkpoints do not record theirs"


def _chat_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[str | None, str]:
    """The processor's chat template, which goes before the tokenizer's, and the file that it is in."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8", errors="replace"), plain.name
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, str):
                return found, name
    found = tokenizer.chat_template
    return (found, "tokenizer_config.json") if isinstance(found, str) else (None, "")


def _system_in(text: str, name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str | None]:
    """Whether the template `name` writes `text`, and with which system message (None is its own)."""
    for system in (None, ""):
        if _written(get_template(name, tokenizer=tokenizer, system=system), tokenizer) == text:
            return True, system
    stand_in = secrets.token_hex(8)
    written = _written(get_template(name, tokenizer=tokenizer, system=stand_in), tokenizer) or ""
    before, found, after = written.partition(stand_in)
    if found and text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
        return True, text[len(before) : len(text) - len(after)]
    return False, None


def _written(template: Template | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The probe question as a template writes it, without what the tokenizer puts in front."""
    if template is None:
        return None
    named = {"image": "<image>", "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    try:
        segments = template.generation([Message("user", (IMAGE, f"\n{_QUESTION}"))])
    except RayvaError:
        return None
    return "".join(named.get(segment.kind) or segment.text for segment in segments)
