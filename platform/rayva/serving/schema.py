"""The chat request of the OpenAI API, as far as Rayva answers it.

A field that would change the answer and is not implemented is refused by name; a field that cannot
change the answer (`user`, `metadata`, ...) is accepted and ignored. Nothing in a request selects a
template, a processor option or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayva.recipes.schema import Serving
from rayva.serving.errors import bad_request
from rayva.text.conversation import IMAGE, ImageSlot, Message

MAX_MESSAGES = 256
MAX_STOPS = 4
MAX_STOP_CHARS = 64

_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "tools": ([],),
}
"""Fields that are accepted at the one value at which they change nothing."""
_FIELDS_OF_ANSWERS = {"refusal", "annotations", "audio", "function_call", "tool_calls"}
"""Fields of an answer's message, which clients send back as it is in the next turn."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """An image as a data URI; `detail` is accepted and has no effect (one resolution per tower)."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Part):
    """An image part of a user message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Part):
    """One message: plain text, or a list of text and image parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields_of_answers(cls, message: Any) -> Any:
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            return message
        return {
            name: value
            for name, value in message.items()
            if name not in _FIELDS_OF_ANSWERS or value not in (None, "", [], {})
        }


class StreamOptions(_Part):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """A request to `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Temperature 0 (the default of this API) is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Chat:
    """A checked request: messages with image slots, and the data URI of each slot in order."""

    messages: tuple[Message, ...]
    image_uris: tuple[str, ...]
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse_chat(payload: object, limits: Serving) -> tuple[str, Chat]:
    """Checks a decoded JSON body; returns the requested model's name and the chat.

    Raises:
        ApiError: status 400, naming the field at fault.
    """
    if not isinstance(payload, Mapping):
        raise bad_request("the body must be a JSON object")
    try:
        request = ChatRequest.model_validate(_without_neutral(payload))
    except ValidationError as error:
        raise _explain(error) from None
    messages, uris = _messages(request.messages, limits)
    options = request.stream_options or StreamOptions()
    chat = Chat(messages, uris, _sampling(request, limits), bool(request.stream), options.include_usage)
    return request.model, chat


def _without_neutral(payload: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in payload.items():
        if name in _IGNORED:
            continue
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise bad_request(
                    f"'{name}' is not supported by this endpoint", name, "unsupported_parameter"
                )
            continue
        kept[name] = value
    return kept


def _explain(error: ValidationError) -> Exception:
    """The first fault. Of a value that fits none of its forms, the one that lies deepest is told."""
    faults = error.errors(include_url=False, include_input=False)
    places = [_place(fault["loc"]) for fault in faults]
    below = [number for number, place in enumerate(places) if place[: len(places[0])] == places[0]]
    deepest = max(below, key=lambda number: len(places[number]))
    kind, place = faults[deepest]["type"], ".".join(map(str, places[deepest]))
    if kind == "extra_forbidden":
        if places[deepest][-1] in _FIELDS_OF_ANSWERS:
            what = f"'{place}' is not supported by this endpoint"
            return bad_request(what, place, "unsupported_parameter")
        return bad_request(f"unknown field '{place}'", place, "unknown_parameter")
    # Pydantic's own words for this one name a Python class.
    what = "Input should be an object" if kind == "model_type" else faults[deepest]["msg"]
    return bad_request(f"'{place}': {what}", place, "invalid_value")


def _place(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where the client wrote it. Pydantic puts the form that it tried behind the name of each union."""
    if loc[0] == "stop":
        return (*loc[:1], *loc[2:])
    if loc[0] == "messages" and loc[2:3] == ("content",):  # the form of the content, and of its part
        return (*loc[:3], *loc[4:5], *loc[6:])
    return loc


def _messages(messages: list[ChatMessage], limits: Serving) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    result: list[Message] = []
    uris: list[str] = []
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        role = _checked_role(message, index, result)
        texts, urls = _split(message)
        if urls and role != "user":
            raise bad_request(f"'{place}': images are allowed in user messages only", place)
        uris += urls
        if len(uris) > limits.max_images:
            what = f"the request holds more than {limits.max_images} images"
            raise bad_request(what, place, "too_many_images")
        result.append(Message(role, _content(texts, len(urls))))
    if result[-1].role != "user":
        raise bad_request("the last message must be the user's", f"messages.{len(messages) - 1}.role")
    return tuple(result), tuple(uris)


def _checked_role(
    message: ChatMessage, index: int, before: list[Message]
) -> Literal["system", "user", "assistant"]:
    """Chat templates know one system message, then users and assistants in turn."""
    role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
    place = f"messages.{index}.role"
    if role == "system" and index > 0:
        raise bad_request("a system message must be the first one, and the only one", place)
    previous = before[-1].role if before else "system"
    expected = "assistant" if previous == "user" else "user"
    if role != "system" and role != expected:
        raise bad_request(f"messages must alternate: expected '{expected}' here, got '{role}'", place)
    return role


def _split(message: ChatMessage) -> tuple[list[str], list[str]]:
    if isinstance(message.content, str):
        return [message.content], []
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    urls = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
    return texts, urls


def _content(texts: list[str], images: int) -> tuple[str | ImageSlot, ...]:
    """Images stand before the text of their message, each on a line of its own, as in training."""
    lines: list[str | ImageSlot] = [IMAGE] * images
    text = "\n".join(texts)
    if text or not images:
        lines.append(text)
    content: list[str | ImageSlot] = []
    for line in lines:
        if content and isinstance(line, str):
            content.append("\n" + line)
        elif content:
            content += ["\n", line]
        else:
            content.append(line)
    return tuple(content)


def _sampling(request: ChatRequest, limits: Serving) -> Sampling:
    asked = request.max_completion_tokens or request.max_tokens or limits.max_new_tokens
    if asked > limits.max_new_tokens:
        field = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        raise bad_request(f"'{field}' is {asked}; this endpoint allows {limits.max_new_tokens}", field)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in stop):
        limit = f"at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARS} characters"
        raise bad_request(f"'stop': {limit}", "stop")
    temperature = request.temperature if request.temperature is not None else 0.0
    top_p = request.top_p if request.top_p is not None else 1.0
    return Sampling(asked, temperature, top_p, stop, request.seed)
