"""Conversation templates: how messages are written down, and which parts the model must produce.

A template turns messages into segments. Its training form marks as supervised what the model has to
produce: each answer with the separator in front of it and its end marker. Its generation form is the
same text up to the place where the assistant is to speak, so that a model is asked exactly as it was
taught.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from rayva.errors import RecipeError
from rayva.text.conversation import BadConversation, ImageSlot, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SegmentKind = Literal["markup", "content", "image", "bos", "eos"]


class Segment(NamedTuple):
    """A piece of a written-down conversation.

    "markup" is the template's own text, in which control tokens count as such; "content" is
    somebody's text, in which they do not. "bos" and "eos" stand for the tokenizer's own tokens;
    their text is what is written where the tokenizer has none.
    """

    text: str
    kind: SegmentKind = "markup"
    supervised: bool = False


IMAGE_SEGMENT = Segment("", "image")
Segments = Iterator[Segment]


class Template(ABC):
    """A way to write conversations down.

    Attributes:
        system: the system message; None leaves it to the tokenizer's own template.
        eos_token: the tokenizer's end-of-sequence token, where it is known and there is one.
    """

    name: ClassVar[str]
    end: ClassVar[str] = "</s>"
    """What ends an answer, where the tokenizer has no end-of-sequence token of its own."""
    adds_bos: ClassVar[bool] = True
    """Whether the sequence begins with what the tokenizer puts in front of any text."""

    def __init__(self, system: str | None, eos_token: str | None) -> None:
        self.system = system
        self.eos_token = eos_token

    @property
    @abstractmethod
    def stop(self) -> tuple[str, ...]:
        """Strings at which generation ends."""

    def training(self, messages: Sequence[Message]) -> list[Segment]:
        """The whole conversation, with what is to be learnt marked as supervised."""
        return list(self._write(messages, open_answer=False))

    def generation(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation up to where the assistant is to speak.

        Raises:
            BadConversation: the last message is not the user's.
        """
        if not messages or messages[-1].role != "user":
            raise BadConversation("no_question", "the last message must be the user's")
        return list(self._write(messages, open_answer=True))

    @abstractmethod
    def _write(self, messages: Sequence[Message], open_answer: bool) -> Segments:
        """Segments of a conversation; `open_answer` adds what stands before the assistant's next word."""


class BuiltInTemplate(Template):
    """A template that is written here. A system message in the conversation replaces its own."""

    default_system: ClassVar[str] = ""

    def __init__(self, system: str | None = None, eos_token: str | None = None) -> None:
        """`system` replaces the template's system message; an empty one leaves it out."""
        super().__init__(self.default_system if system is None else system, eos_token)

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.eos_token or self.end,)

    def _write(self, messages: Sequence[Message], open_answer: bool) -> Segments:
        given = [message.text for message in messages if message.role == "system"]
        rest = [message for message in messages if message.role != "system"]
        yield from self._write_turns("\n".join(given) if given else self.system or "", rest)
        if open_answer:
            yield from self._open_answer()

    @abstractmethod
    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        """Segments of the user's and the assistant's messages after a system message."""

    @abstractmethod
    def _open_answer(self) -> Segments:
        """What stands between the last user message and the assistant's first word."""


def content_segments(message: Message, supervised: bool = False) -> Segments:
    for part in message.content:
        if isinstance(part, ImageSlot):
            yield IMAGE_SEGMENT
        else:
            yield Segment(part, "content", supervised)


def _without_leading_answers(messages: list[Message]) -> list[Message]:
    """An assistant that speaks first answers nothing: the original leaves such turns out."""
    first = next((index for index, m in enumerate(messages) if m.role == "user"), len(messages))
    return messages[first:]


def _up_to_the_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """Without the empty messages that follow an answer: the original's llama_2 writes nothing for them."""
    end = max((index for index, message in enumerate(messages, 1) if not message.is_empty), default=0)
    return messages[:end] if end and messages[end - 1].role == "assistant" else messages


class Plain(BuiltInTemplate):
    """Image, then caption: stage 1 of LLaVA 1.0 and later. Questions are left out."""

    name = "plain"
    end = "\n"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.end,)

    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        for message in _without_leading_answers(messages):
            if message.role == "assistant":
                yield from content_segments(message, supervised=True)
                yield Segment(self.end, supervised=True)
            else:
                yield from (IMAGE_SEGMENT for _ in range(message.num_images))

    def _open_answer(self) -> Segments:
        yield from ()


class V0(BuiltInTemplate):
    """LLaVA of the paper: `###` between turns (table 2 with <STOP> = ###)."""

    name = "v0"
    default_system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions."
    )
    end = "###"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.end,)

    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        if system:
            yield Segment(system, "content")
            yield Segment("\n\n")
        yield Segment("### ")
        for message in messages:
            answer = message.role == "assistant"
            yield Segment("Assistant:" if answer else "Human:")
            yield Segment(" ", supervised=answer)
            yield from content_segments(message, answer)
            yield Segment("\n###", supervised=answer)
            yield Segment(" ")

    def _open_answer(self) -> Segments:
        yield Segment("Assistant:")


class V1(BuiltInTemplate):
    """Vicuna v1.1 and later, LLaVA 1.0 and 1.5: USER and ASSISTANT."""

    name = "v1"
    default_system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    )

    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        messages = _without_leading_answers(messages)
        if system:
            yield Segment(system, "content")
            yield Segment(" ")
        for index, message in enumerate(messages):
            if message.role == "user":
                # Like the original, an empty question is a bare header.
                yield Segment("USER:" if message.is_empty else "USER: ")
                yield from content_segments(message)
                yield Segment("" if message.is_empty else " ")
                continue
            yield Segment("ASSISTANT:")
            if message.text:
                yield Segment(" ", supervised=True)
                yield from content_segments(message, supervised=True)
            # Like the original, an empty answer in mid-conversation is written as a bare header.
            if message.text or index == len(messages) - 1:
                yield Segment(self.end, "eos", supervised=True)

    def _open_answer(self) -> Segments:
        yield Segment("ASSISTANT:")


class Llama2(BuiltInTemplate):
    """Llama-2-chat with LLaVA's short system message."""

    name = "llama_2"
    default_system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content "
        "that the user provides, and assist the user with a variety of tasks using natural language."
    )

    def training(self, messages: Sequence[Message]) -> list[Segment]:
        return super().training(_up_to_the_last_answer(messages))

    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        messages = _without_leading_answers(messages)
        for index, message in enumerate(messages):
            if message.role == "user":
                # Like the original's, an empty question is written as nothing; but it parts two answers.
                around = (*messages[index - 1 : index], *messages[index + 1 : index + 2])
                if index and message.is_empty and any(neighbour.is_empty for neighbour in around):
                    continue
                if index:
                    yield Segment("", "bos")
                yield Segment("[INST] ")
                if index == 0 and system:
                    yield Segment("<<SYS>>\n")
                    yield Segment(system, "content")
                    yield Segment("\n<</SYS>>\n\n")
                yield from content_segments(message)
                yield Segment(" [/INST]")
                continue
            if message.text:
                yield Segment(" ", supervised=True)
                yield from content_segments(message, supervised=True)
            # Like the original, an empty answer in mid-conversation is written as nothing.
            if message.text or index == len(messages) - 1:
                yield Segment(" ", supervised=True)
                yield Segment(self.end, "eos", supervised=True)

    def _open_answer(self) -> Segments:
        yield from ()


class ChatML(BuiltInTemplate):
    """ChatML: SmolLM2, Qwen and others. The markers are control tokens where the tokenizer has them."""

    name = "chatml"
    default_system = "You are a helpful assistant that can see images."
    end = "<|im_end|>"

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.end,)

    def _write_turns(self, system: str, messages: list[Message]) -> Segments:
        if system:
            yield Segment("<|im_start|>system\n")
            yield Segment(system, "content")
            yield Segment("<|im_end|>\n")
        for message in messages:
            answer = message.role == "assistant"
            yield Segment(f"<|im_start|>{message.role}\n")
            yield from content_segments(message, answer)
            yield Segment(self.end, supervised=answer)
            yield Segment("\n")

    def _open_answer(self) -> Segments:
        yield Segment("<|im_start|>assistant\n")


_BUILT_IN: dict[str, type[BuiltInTemplate]] = {cls.name: cls for cls in (Plain, V0, V1, Llama2, ChatML)}
TEMPLATE_NAMES = (*_BUILT_IN, "tokenizer")


def get_template(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, system: str | None = None
) -> Template:
    """The template called `name`; `system` replaces its system message, an empty one leaves it out.

    `tokenizer` gives its end-of-sequence token to the stop strings, and its chat template to
    "tokenizer".

    Raises:
        RecipeError: there is no such template, or the tokenizer has no chat template.
    """
    if name == "tokenizer":
        from rayva.text.chat_template import ChatTemplate

        return ChatTemplate(tokenizer, system)
    if name not in _BUILT_IN:
        known = ", ".join(TEMPLATE_NAMES)
        raise RecipeError(f'unknown conversation template "{name}"', f"use one of {known}")
    eos_token = tokenizer.eos_token if tokenizer is not None else None
    return _BUILT_IN[name](system, eos_token)
