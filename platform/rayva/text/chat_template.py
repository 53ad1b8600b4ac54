"""The tokenizer's own chat template, as it comes with a Hugging Face tokenizer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayva.errors import RecipeError
from rayva.text.chat_rendering import render_chat
from rayva.text.conversation import BadConversation, Message, MessageRole
from rayva.text.templates import Segment, Segments, Template, content_segments
from rayva.text.twin import twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Roles = tuple[MessageRole, ...]
_MOST_LAYOUTS = 1024
"""Sequences of roles that are remembered; a served model may be sent any."""


class ChatTemplate(Template):
    """Writes conversations as the tokenizer's own template does.

    The template is rendered around stand-ins for the messages, once for each sequence of roles, and
    the messages are put in their places. So what is the template's and what is somebody's text is
    known exactly. White space at the ends of a message, which some templates take off, is kept. An
    answer before the first question is left out where the template has no place for it.
    """

    name = "tokenizer"
    adds_bos = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, system: str | None = None) -> None:
        """`system` goes in front as a system message; None leaves the template its own default.

        Raises:
            RecipeError: no tokenizer, one without a chat template, or one that takes no system message.
        """
        if tokenizer is None or not tokenizer.chat_template:
            raise RecipeError(
                "this tokenizer has no chat template of its own",
                "choose another conversation.template, for example chatml",
            )
        super().__init__(system, tokenizer.eos_token)
        self._tokenizer = tokenizer
        self._stand_in = f"rayva-{secrets.token_hex(8)}-"
        self._layouts: dict[tuple[Roles, bool], list[str]] = {}
        if system is not None and not self._takes(("system", "user", "assistant")):
            raise RecipeError(
                "this tokenizer's chat template takes no system message",
                "leave conversation.system out, or choose another conversation.template",
            )

    @property
    def stop(self) -> tuple[str, ...]:
        end = self._end_marker(("user", "assistant"), 1)
        return tuple(dict.fromkeys(text for text in (end.strip() or end, self.eos_token) if text))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        given = any(message.role == "system" for message in messages)
        if given or self.system is None:
            return list(messages)
        return [Message("system", (self.system,)), *messages]

    def _without_unasked(self, messages: list[Message]) -> list[Message]:
        """`messages` without an answer before the first question, if the template refuses that."""
        spoken = [message for message in messages if message.role != "system"]
        if not spoken or spoken[0].role == "user" or self._takes(tuple(m.role for m in messages)):
            return messages
        first = messages.index(spoken[0])
        return [*messages[:first], *messages[first + 1 :]]

    def _takes(self, roles: Roles) -> bool:
        try:
            self._layout(roles, False)
        except BadConversation:
            return False
        return True

    def _write(self, messages: Sequence[Message], open_answer: bool) -> Segments:
        messages = self._without_unasked(self._with_system(messages))
        roles = tuple(message.role for message in messages)
        if open_answer:
            # Written as before an answer in training, so that a model is asked as it was taught even by
            # a template that prompts in other words than it trains with.
            roles = (*roles, "assistant")
        *before, after = self._layout(roles, False)
        end = ""
        for index, (message, markup) in enumerate(zip(messages, before, strict=False)):
            answer = message.role == "assistant"
            given = self._given(roles, index, markup) if answer else len(markup)
            # The end marker of an answer is the beginning of the markup that follows it.
            yield Segment(markup[len(end) : given])
            yield Segment(markup[max(given, len(end)) :], supervised=answer)
            yield from content_segments(message, answer)
            end = self._end_marker(roles, index) if answer else ""
            yield Segment(end, supervised=answer)
        if open_answer:
            yield Segment(before[-1][len(end) : self._given(roles, len(messages), before[-1])])
        else:
            yield Segment(after[len(end) :])

    def _given(self, roles: Roles, index: int, markup: str) -> int:
        """How much of the markup before the answer at `index` the generation prompt gives.

        The rest, usually nothing or a space, is the model's to produce.
        """
        prompt = self._layout(roles[:index], True)[-1] if index else ""
        return len(prompt) if index and markup.startswith(prompt) else len(markup)

    def _end_marker(self, roles: Roles, index: int) -> str:
        """What ends the answer at `index`: what the template writes after an answer, come what may.

        Up to its first control token, if it has one: "<|im_end|>" of "<|im_end|>" and a new line.
        """
        after = self._layout(roles, False)[index + 1]
        after_last = self._layout(roles[: index + 1], False)[-1]
        same = (a == b for a, b in zip(after, after_last, strict=False))
        end = after[: next((at for at, equal in enumerate(same) if not equal), len(after_last))]
        return end[: twin_of(self._tokenizer).first_control_end(end)]

    def _layout(self, roles: Roles, generation: bool) -> list[str]:
        if (roles, generation) not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[roles, generation] = self._render(roles, generation)
        return self._layouts[roles, generation]

    def _render(self, roles: Roles, generation: bool) -> list[str]:
        """The template's text before, between and after messages of these roles: one more than those."""
        stand_ins = [f"{self._stand_in}{index}." for index in range(len(roles))]
        messages = [
            {"role": role, "content": stand_in} for role, stand_in in zip(roles, stand_ins, strict=True)
        ]
        try:
            rest = render_chat(self._tokenizer, messages, generation)
        except Exception as error:  # the template's code is anybody's
            why = str(error) or type(error).__name__
            raise BadConversation(
                "chat_template",
                f"the tokenizer's chat template refuses the roles {', '.join(roles)}: {why}",
                "choose another conversation.template, for example chatml",
            ) from error
        layout = []
        for role, stand_in in zip(roles, stand_ins, strict=True):
            before, found, rest = rest.partition(stand_in)
            if not found or stand_in in rest:
                raise BadConversation(
                    "chat_template",
                    f"the tokenizer's chat template does not write the {role} message exactly once, in order",
                    "choose another conversation.template, for example chatml",
                )
            layout.append(before)
        return [*layout, rest]
