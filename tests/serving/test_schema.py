"""What a request may hold, and the conversation that it becomes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from rayva.data.schema import Turn
from rayva.recipes.schema import Serving
from rayva.serving.errors import ApiError
from rayva.serving.media import max_body_bytes
from rayva.serving.schema import Sampling, parse_chat
from rayva.text.conversation import ImageSlot, Message, messages_from_turns

LIMITS = Serving(max_new_tokens=64, max_images=2)
ASK = [{"role": "user", "content": "What?"}]


def parse(messages: Any = ASK, **fields: Any) -> Any:
    return parse_chat({"model": "m", "messages": messages, **fields}, LIMITS)[1]


def image(url: str = "data:image/png;base64,AA==") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def written(message: Message) -> str:
    return "".join("<IMAGE>" if isinstance(part, ImageSlot) else part for part in message.content)


def test_defaults() -> None:
    chat = parse()
    assert chat.sampling == Sampling(64, 0.0, 1.0, (), None)
    assert (chat.stream, chat.include_usage, chat.image_uris) == (False, False, ())


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([image(), text("What?")], "<IMAGE>\nWhat?"),
        ([text("What?"), image()], "<IMAGE>\nWhat?"),
        ([image(), image(), text("Which?")], "<IMAGE>\n<IMAGE>\nWhich?"),
        ([text("a"), text("b")], "a\nb"),
        ([image()], "<IMAGE>"),
        ([text("<image>"), image()], "<IMAGE>\n<image>"),
    ],
)
def test_pictures_stand_before_the_text(parts: list[dict[str, Any]], expected: str) -> None:
    [message] = parse([{"role": "user", "content": parts}]).messages
    assert written(message) == expected


def test_a_question_is_written_as_in_training() -> None:
    [trained] = messages_from_turns([Turn("human", "<image>\nWhat?")], 1)
    [asked] = parse([{"role": "user", "content": [image(), text("What?")]}]).messages
    assert asked.content == trained.content


BAD = {
    "no messages": ([], {}),
    "unknown role": ([{"role": "tool", "content": "x"}], {}),
    "system not first": ([*ASK, {"role": "system", "content": "x"}, *ASK], {}),
    "two users in a row": ([*ASK, *ASK], {}),
    "assistant last": ([*ASK, {"role": "assistant", "content": "x"}], {}),
    "assistant first": ([{"role": "assistant", "content": "x"}, *ASK], {}),
    "image from the assistant": ([*ASK, {"role": "assistant", "content": [image()]}, *ASK], {}),
    "image from the system": ([{"role": "system", "content": [image()]}, *ASK], {}),
    "content missing": ([{"role": "user"}], {}),
    "content null": ([{"role": "user", "content": None}], {}),
    "unknown part": ([{"role": "user", "content": [{"type": "input_audio"}]}], {}),
    "image url as text": ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {}),
    "too many images": ([{"role": "user", "content": [image()] * 3}], {}),
    "max_tokens 0": (ASK, {"max_tokens": 0}),
    "max_tokens over the limit": (ASK, {"max_tokens": 65}),
    "max_completion_tokens over the limit": (ASK, {"max_completion_tokens": 65}),
    "temperature too high": (ASK, {"temperature": 2.5}),
    "temperature not finite": (ASK, {"temperature": float("nan")}),
    "top_p 0": (ASK, {"top_p": 0}),
    "n 2": (ASK, {"n": 2}),
    "tools": (ASK, {"tools": [{"type": "function"}]}),
    "logprobs": (ASK, {"logprobs": True}),
    "json": (ASK, {"response_format": {"type": "json_object"}}),
    "penalty": (ASK, {"frequency_penalty": 0.5}),
    "chat template": (ASK, {"chat_template": "{{ messages }}"}),
    "processor options": (ASK, {"mm_processor_kwargs": {"trust_remote_code": True}}),
    "five stops": (ASK, {"stop": list("abcde")}),
    "empty stop": (ASK, {"stop": ""}),
    "stop number": (ASK, {"stop": 3}),
    "messages text": ("hello", {}),
}


@pytest.mark.parametrize(("messages", "fields"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_answered_is_a_400(messages: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parse(messages, **fields)
    assert caught.value.status == 400
    assert caught.value.message
    if fields:
        assert caught.value.param == next(iter(fields))


def part(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [text("What?"), fields]}]


@pytest.mark.parametrize(
    ("messages", "fields", "place", "fault"),
    [
        (part(type="image_url", image_url="data:x"), {}, "messages.0.content.1.image_url", "an object"),
        (part(type="image_url"), {}, "messages.0.content.1.image_url", "required"),
        (part(type="image_url", image_url={}), {}, "messages.0.content.1.image_url.url", "required"),
        (
            part(type="image_url", image_url={"url": "x", "detail": "ultra"}),
            {},
            "messages.0.content.1.image_url.detail",
            "'low' or 'high'",
        ),
        (part(type="text", txt="What?"), {}, "messages.0.content.1.text", "required"),
        (part(type="text", text="What?", x=1), {}, "messages.0.content.1.x", "unknown field"),
        (part(type="input_image"), {}, "messages.0.content.1", "'input_image'.*'text', 'image_url'"),
        ([{"role": "user", "content": None}], {}, "messages.0.content", "valid string"),
        ([{"role": "user", "content": "x", "text": "x"}], {}, "messages.0.text", "unknown field"),
        (["What?"], {}, "messages.0", "an object"),
        (ASK, {"stop": ["a", 3]}, "stop.1", "valid string"),
        (ASK, {"stop": 3}, "stop", "valid string"),
    ],
)
def test_a_fault_is_told_where_it_is(messages: Any, fields: dict[str, Any], place: str, fault: str) -> None:
    with pytest.raises(ApiError, match=fault) as caught:
        parse(messages, **fields)
    assert caught.value.param == place
    assert f"'{place}'" in caught.value.message


@pytest.mark.parametrize("nothing", [None, [], "", {}])
@pytest.mark.parametrize("field", ["refusal", "annotations", "audio", "function_call", "tool_calls"])
def test_an_answer_is_taken_back_with_its_empty_fields(field: str, nothing: object) -> None:
    answer = {"role": "assistant", "content": "A cat."}
    assert parse([*ASK, {**answer, field: nothing}, *ASK]) == parse([*ASK, answer, *ASK])
    with pytest.raises(ApiError, match=f"'messages.1.{field}' is not supported") as caught:
        parse([*ASK, {**answer, field: ["x"]}, *ASK])
    assert caught.value.param == f"messages.1.{field}"
    with pytest.raises(ApiError, match=f"'messages.0.{field}'"):
        parse([{**ASK[0], field: nothing}])


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "user": "me"},
        {"response_format": {"type": "text"}, "tools": [], "metadata": {"a": "b"}, "store": False},
        {"temperature": None, "top_p": None, "stop": None, "max_tokens": None, "seed": None, "stream": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert parse(**fields) == parse()


def test_developer_is_the_new_name_of_system() -> None:
    chat = parse([{"role": "developer", "content": "Be brief."}, *ASK])
    assert [message.role for message in chat.messages] == ["system", "user"]


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ApiError(413, "too large", "messages", "too_many_bytes")))
    assert (error.status, error.body()) == (
        413,
        ApiError(413, "too large", "messages", "too_many_bytes").body(),
    )


def test_the_body_limit_holds_all_images_in_base64() -> None:
    limits = Serving(max_images=3, max_image_bytes=1_000_000)
    assert max_body_bytes(limits) > 3 * 4 * 1_000_000 / 3
