"""How the original LLaVA (1.0 and later) reads a row, written anew and shortly: a reference to test against.

It finds what to mask by tokenising pieces of the prompt alone and adding up their lengths, which is right
for Llama's vocabulary only, and gives a sample up where the lengths do not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 2048
V0_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
V1_SYSTEM = V0_SYSTEM.replace("human", "user")
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
Turns = list[tuple[str, str]]
Read = tuple[str, list[int], list[int] | None]
"""Prompt, input ids (image -200), and labels (-100 where masked); no labels where the sample is dropped."""


def read(name: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Read:
    """`AssertionError` where the original stops with one."""
    has_image = "image" in row
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    if has_image:
        turns = [(role, _image_first(text) if "<image>" in text else text) for role, text in turns]
    prompt = _PROMPTS[name](turns)

    def ids_of(text: str) -> list[int]:
        return _ids_around_images(text, tokenizer) if has_image else list(tokenizer(text).input_ids)

    input_ids = ids_of(prompt) if has_image else ids_of(prompt)[:MAX_LENGTH]
    if name == "plain":
        lead = len(ids_of("<image>"))
        return prompt, input_ids, [-100] * lead + input_ids[lead:]
    if name == "v0":
        return prompt, input_ids, None
    separator = " ASSISTANT: " if name == "v1" else "[/INST] "
    return prompt, input_ids, _labels(prompt, input_ids, separator, name == "v1", ids_of)


def _image_first(text: str) -> str:
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def _ids_around_images(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first, *others = (list(tokenizer(piece).input_ids) for piece in prompt.split("<image>"))
    ids = first
    for other in others:
        ids += [-200, *other[1:]]
    return ids


def _labels(
    prompt: str, input_ids: list[int], separator: str, v1: bool, ids_of: Callable[[str], list[int]]
) -> list[int] | None:
    labels, at = [-100] * len(input_ids), 1
    for index, text in enumerate(prompt.split("</s>")):
        question, *answer = text.split(separator)
        if not text or len(answer) != 1:
            break
        one_less = int(v1 and index > 0)
        start, end = at + len(ids_of(question + separator)) - 2 - one_less, at + len(ids_of(text)) - one_less
        labels[start:end] = input_ids[start:end]
        at = end
    return labels if at in (len(input_ids), MAX_LENGTH) or at > MAX_LENGTH else None


def _alternating(turns: Turns) -> Turns:
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    assert all(role == ("human", "gpt")[index % 2] for index, (role, _) in enumerate(turns))
    return turns


def _plain(turns: Turns) -> str:
    assert len(turns) == 2
    assert "<image>" in turns[0][1]
    return f"<image>{turns[1][1]}\n"


def _v0(turns: Turns) -> str:
    names = {"human": "Human", "gpt": "Assistant"}
    return V0_SYSTEM + "\n\n" + "".join(f"### {names[role]}: {text}\n" for role, text in turns) + "### "


def _v1(turns: Turns) -> str:
    prompt = V1_SYSTEM + " "
    for role, text in _alternating(turns):
        name, end = ("USER", " ") if role == "human" else ("ASSISTANT", "</s>")
        prompt += f"{name}: {text}{end}" if text else f"{name}:"
    return prompt


def _llama_2(turns: Turns) -> str:
    prompt = ""
    for index, (role, text) in enumerate(_alternating(turns)):
        assert text or index
        if index == 0:
            text = f"<<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n{text}"
        if text:
            prompt += f"<s>[INST] {text} [/INST]" if role == "human" else f" {text} </s>"
    return prompt.removeprefix("<s>")


_PROMPTS: dict[str, Callable[[Turns], str]] = {"plain": _plain, "v0": _v0, "v1": _v1, "llama_2": _llama_2}
