"""Conversations with images: LLaVA turns as messages, and where an image stands in its turn."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from rayva.data.schema import IMAGE_PLACEHOLDER, Turn
from rayva.errors import DataError

MessageRole = Literal["system", "user", "assistant"]
ImagePosition = Literal["data", "front", "random"]


class ImageSlot:
    """The place of one image in a message. Text can never become one: it is not a string."""

    def __repr__(self) -> str:
        return "IMAGE"


IMAGE: Final = ImageSlot()
Content = tuple[str | ImageSlot, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One message: text and image slots in reading order."""

    role: MessageRole
    content: Content

    @property
    def text(self) -> str:
        """The text alone, without the image slots."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def num_images(self) -> int:
        return sum(isinstance(part, ImageSlot) for part in self.content)

    @property
    def is_empty(self) -> bool:
        """Neither text nor image."""
        return not any(self.content)


class BadConversation(DataError):
    """A conversation that cannot be used; `reason` is short and machine-readable.

    Reasons: "no_turns", "unknown_role", "no_human_turn" (nowhere to put the images),
    "more_markers_than_images", "fewer_markers_than_images", "no_question" (nothing to answer),
    "chat_template" (the tokenizer's own template refuses it).
    """

    def __init__(self, reason: str, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.reason = reason


_ROLES: Final[dict[str, MessageRole]] = {"human": "user", "gpt": "assistant"}


def split_markers(text: str) -> Content:
    """Text in which each `<image>` is an image's place, as content."""
    pieces = text.split(IMAGE_PLACEHOLDER)
    content: list[str | ImageSlot] = [pieces[0]] if pieces[0] else []
    for piece in pieces[1:]:
        content.append(IMAGE)
        if piece:
            content.append(piece)
    return tuple(content)


def messages_from_turns(turns: Sequence[Turn], n_images: int) -> list[Message]:
    """Turns of a LLaVA row with `n_images` images, as messages with exactly as many slots.

    `<image>` marks a place only in the human turns of a row that has images: everywhere else it is
    text that somebody typed. Images without any marker go in front of the first human turn.

    Raises:
        BadConversation: no turns, an unknown role, or markers and images that do not match.
    """
    if not turns:
        raise BadConversation("no_turns", "the conversation has no turns")
    messages = []
    for turn in turns:
        role = _ROLES.get(turn.role)
        if role is None:
            raise BadConversation("unknown_role", f'unknown role "{turn.role}"', "use human and gpt")
        marks = n_images > 0 and role == "user"
        content = split_markers(turn.text) if marks else ((turn.text,) if turn.text else ())
        messages.append(Message(role, content))
    markers = sum(message.num_images for message in messages)
    if n_images and not markers:
        return _prepend_images(messages, n_images)
    if markers != n_images:
        word = "more" if markers > n_images else "fewer"
        raise BadConversation(
            f"{word}_markers_than_images",
            f"{markers} {IMAGE_PLACEHOLDER} markers for {n_images} images",
            "give every image exactly one marker, or none at all",
        )
    return messages


def _prepend_images(messages: list[Message], n_images: int) -> list[Message]:
    for index, message in enumerate(messages):
        if message.role == "user":
            content = _images_first(n_images, message.text)
            return [*messages[:index], replace(message, content=content), *messages[index + 1 :]]
    raise BadConversation("no_human_turn", "the row has images but no human turn to show them in")


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Random choices of a sample's visit: the same whoever makes them, and in whatever order."""
    key = f"{seed}/{epoch}/{index}".encode()
    return random.Random(hashlib.blake2b(key, digest_size=8).digest())


def place_image(messages: Sequence[Message], position: ImagePosition, rng: random.Random) -> list[Message]:
    """Moves images within their turns.

    "data" leaves them. "front" moves them to the front of each turn, on lines of their own (LLaVA
    1.0 and later). "random" puts those of the first turn that has any before or after its text with
    equal chance, drawn from `rng` (paper, equation 2), and leaves the others.
    """
    if position == "data":
        return list(messages)
    placed = []
    drawn = False
    for message in messages:
        if message.num_images and position == "front":
            message = replace(message, content=_images_first(message.num_images, message.text.strip()))
        elif message.num_images and not drawn:
            drawn = True
            arrange = _images_first if rng.random() < 0.5 else _images_last
            message = replace(message, content=arrange(message.num_images, message.text.strip()))
        placed.append(message)
    return placed


def _images_first(count: int, text: str) -> Content:
    return split_markers("\n".join([IMAGE_PLACEHOLDER] * count)) + ((f"\n{text}",) if text else ())


def _images_last(count: int, text: str) -> Content:
    return ((f"{text}\n",) if text else ()) + split_markers("\n".join([IMAGE_PLACEHOLDER] * count))
