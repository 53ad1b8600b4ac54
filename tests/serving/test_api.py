"""The HTTP interface over the built-in engine, asked by the official OpenAI client."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import openai
import pytest

from rayva.errors import ServingError
from rayva.model.folder import Assistant
from rayva.serving.api import ApiSettings
from rayva.serving.engine import Piece
from rayva.serving.errors import ApiError
from rayva.serving.keys import key_digests
from rayva.serving.media import load_images
from rayva.serving.schema import parse_chat
from tests.serving.conftest import LIMITS, HttpServer, data_uri, picture, question


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def direct_answer(assistant: Assistant, messages: list[dict[str, object]], max_tokens: int = 16) -> str:
    """What the model itself answers, without engine and HTTP."""
    _, chat = parse_chat({"model": "tiny", "messages": messages}, LIMITS)
    features = assistant.encode_images(load_images(chat.image_uris, LIMITS))
    return assistant.answer_batch([list(chat.messages)], [features], max_tokens)[0]


def test_answer_is_the_models_own(client: openai.OpenAI, assistant: Assistant) -> None:
    messages = question("What is in the picture?", data_uri(picture(1)))
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    assert response.choices[0].message.content == direct_answer(assistant, messages)
    assert response.choices[0].message.role == "assistant"
    assert response.object == "chat.completion"
    assert response.usage.prompt_tokens > assistant.settings.vision.tokens
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_the_picture_matters(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(
            model="tiny", messages=question("What?", data_uri(picture(seed))), max_tokens=16
        )
        .choices[0]
        .message.content
        for seed in range(6)
    }
    assert len(answers) > 1


def test_streaming_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    messages = question("Where is it?", data_uri(picture(2, "JPEG"), "jpeg"))
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_finish_reason_is_length_at_the_limit(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(model="tiny", messages=question("What?"), max_tokens=1)
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 1


def test_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    messages = question("Where is it?", data_uri(picture(2)))
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    text = whole.choices[0].message.content
    stop = text[5:8]
    cut = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_seed_repeats_a_sampled_answer(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        response = client.chat.completions.create(
            model="tiny", messages=question("What?"), max_tokens=16, temperature=1.5, top_p=0.9, seed=seed
        )
        return response.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_several_turns_and_a_system_message(client: openai.OpenAI, assistant: Assistant) -> None:
    messages = [
        {"role": "system", "content": "Answer in one word."},
        *question("What is it?", data_uri(picture(3))),
        {"role": "assistant", "content": "square"},
        {"role": "user", "content": "And its colour?"},
    ]
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    assert response.choices[0].message.content == direct_answer(assistant, messages)


@pytest.mark.parametrize("dumped", [False, True])
def test_an_answer_goes_back_as_the_client_holds_it(
    client: openai.OpenAI, assistant: Assistant, dumped: bool
) -> None:
    first = question("What is it?", data_uri(picture(3)))
    answer = client.chat.completions.create(model="tiny", messages=first, max_tokens=8).choices[0].message
    second = {"role": "user", "content": "And its colour?"}
    response = client.chat.completions.create(
        model="tiny", messages=[*first, answer.model_dump() if dumped else answer, second], max_tokens=16
    )
    conversation = [*first, {"role": "assistant", "content": answer.content}, second]
    assert response.choices[0].message.content == direct_answer(assistant, conversation)


@pytest.mark.parametrize("sampling", [{"temperature": 1e-38}, {"temperature": 1, "top_p": 1e-300}])
def test_sampling_at_its_lowest_is_greedy(client: openai.OpenAI, sampling: dict[str, float]) -> None:
    greedy, sampled = (
        client.chat.completions.create(
            model="tiny", messages=question("What?"), max_tokens=16, extra_body=fields
        )
        .choices[0]
        .message.content
        for fields in ({}, sampling)
    )
    assert sampled == greedy


def test_typed_control_tokens_stay_text(client: openai.OpenAI, assistant: Assistant) -> None:
    """A typed <image> asks for no features, and a typed </s> is no end: both cost more than one token."""
    typed = question("<image></s><s> What?")
    plain = question(" What?")
    usage = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).usage.prompt_tokens
        for messages in (typed, plain)
    ]
    written = sum(
        len(assistant.tokenizer.tokenize(part))
        for part in ("<", "image", ">", "<", "/", "s", ">", "<", "s", ">")
    )
    assert usage[1] + 5 < usage[0] <= usage[1] + written


def test_models(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


BAD_URLS = {
    "http": ("http://127.0.0.1:9/cat.png", "unsupported_image_url"),
    "https": ("https://example.com/cat.png", "unsupported_image_url"),
    "file": ("file:///etc/passwd", "unsupported_image_url"),
    "no scheme": ("/etc/passwd", "unsupported_image_url"),
    "not an image type": ("data:text/html;base64,aGk=", "unsupported_image_url"),
    "not base64 encoded": ("data:image/svg+xml,<svg/>", "unsupported_image_url"),
    "bad base64": ("data:image/png;base64,!!!!", "invalid_base64"),
    "not a picture": (data_uri(b"hello, this is no picture"), "not_an_image"),
    "truncated": (data_uri(picture()[:200]), "truncated"),
    "empty": ("data:image/png;base64,", "truncated"),
}


@pytest.mark.parametrize(("bad", "code"), BAD_URLS.values(), ids=BAD_URLS.keys())
def test_bad_image_is_refused(client: openai.OpenAI, bad: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=question("What?", bad))
    assert caught.value.code == code
    assert "image 0" in str(caught.value)


def test_base64_in_lines_is_told(client: openai.OpenAI) -> None:
    lines = f"data:image/png;base64,{base64.encodebytes(picture()).decode()}"
    with pytest.raises(openai.BadRequestError, match="on one line"):
        client.chat.completions.create(model="tiny", messages=question("What?", lines))


def test_too_many_images(client: openai.OpenAI) -> None:
    uri = data_uri(picture())
    with pytest.raises(openai.BadRequestError, match="more than 2 images") as caught:
        client.chat.completions.create(model="tiny", messages=question("What?", uri, uri, uri))
    assert caught.value.code == "too_many_images"


def test_too_large_an_image_is_413(client: openai.OpenAI) -> None:
    large = data_uri(picture(size=(200, 200), kind="BMP"), "bmp")
    with pytest.raises(openai.APIStatusError, match="larger than 50000 bytes") as caught:
        client.chat.completions.create(model="tiny", messages=question("What?", large))
    assert caught.value.status_code == 413


def test_a_bomb_is_refused_by_its_size_not_its_bytes(client: openai.OpenAI) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(openai.APIStatusError, match="pixels") as caught:
        client.chat.completions.create(model="tiny", messages=question("What?", data_uri(bomb)))
    assert caught.value.status_code == 413


def test_too_large_a_body_is_413(url: str) -> None:
    assert _post(url, b'{"model": "' + b"x" * 8_000_000 + b'"}')[0] == 413


def test_too_long_a_conversation_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.chat.completions.create(model="tiny", messages=question("circle " * 600))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=question("circle " * 600), stream=True)


def test_the_answer_ends_where_the_context_ends(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(model="tiny", messages=question("x"), max_tokens=1)
    filler = "circle "
    probe = client.chat.completions.create(model="tiny", messages=question("x" + filler), max_tokens=1)
    each = probe.usage.prompt_tokens - short.usage.prompt_tokens
    text = "x" + filler * ((512 - 4 - short.usage.prompt_tokens) // each)
    response = client.chat.completions.create(model="tiny", messages=question(text), max_tokens=32)
    assert response.usage.prompt_tokens < 512
    assert response.usage.total_tokens <= 512


def test_wrong_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.chat.completions.create(model="gpt-4o", messages=question("What?"))


def _post(url: str, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_body_that_is_no_request(url: str, body: bytes) -> None:
    status, answer = _post(url, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model": "\ud800", "messages": [{"role": "user", "content": "x"}]}',
        rb'{"model": "tiny", "messages": [{"role": "user", "content": "a \udc80 b"}]}',
        b'{"model": "\xed\xa0\x80", "messages": []}',
        rb'{"\ud800": 1}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused(url: str, body: bytes) -> None:
    status, answer = _post(url, body)
    assert status == 400
    assert "surrogate" in str(answer["error"]["message"])


def test_unknown_routes_have_the_same_error_form(url: str) -> None:
    assert _post(url, b"{}", "/v1/completions")[0] == 404
    status, answer = _post(url, b"{}", "/healthz")
    assert status == 405
    assert answer["error"]["message"]


class BrokenEngine:
    """An engine that is not there, or dies half-way."""

    def __init__(self, after: int, error: Exception) -> None:
        self._after, self._error = after, error

    async def generate(self, messages: object, images: object, sampling: object) -> AsyncIterator[Piece]:
        for _ in range(self._after):
            yield Piece("x")
        raise self._error

    async def ready(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("status", "kind"), [(429, openai.RateLimitError), (503, openai.InternalServerError)]
)
def test_overload_and_absence(status: int, kind: type[openai.APIStatusError]) -> None:
    engine = BrokenEngine(0, ApiError(status, "not now"))
    with HttpServer(engine, ApiSettings("tiny", LIMITS)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(model="tiny", messages=question("What?"), stream=stream)
            assert caught.value.status_code == status
            assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/healthz")


def test_a_failure_in_mid_stream_reaches_the_client() -> None:
    with HttpServer(BrokenEngine(2, ApiError(503, "gone")), ApiSettings("tiny", LIMITS)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        stream = client.chat.completions.create(model="tiny", messages=question("What?"), stream=True)
        with pytest.raises(openai.APIError, match="gone"):
            list(stream)


def test_a_defect_is_a_500_without_its_details() -> None:
    with HttpServer(BrokenEngine(0, KeyError("secret")), ApiSettings("tiny", LIMITS)) as address:
        body = json.dumps({"model": "tiny", "messages": question("What?")}).encode()
        status, answer = _post(address, body)
    assert status == 500
    assert "secret" not in json.dumps(answer)


def test_keys_are_asked_for() -> None:
    settings = ApiSettings("tiny", LIMITS, key_digests({"RAYVA_API_KEYS": "first, second"}))
    with HttpServer(BrokenEngine(0, ApiError(429, "past the door")), settings) as address:
        for key in ("", "third", "first, second"):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=key or "none", max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(model="tiny", messages=question("What?"))
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
            assert [card.id for card in client.models.list()] == ["tiny"]
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="tiny", messages=question("What?"))


@pytest.mark.parametrize("key", ["schlüssel", "a\tb", "🗝"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ServingError, match="Key 2 of RAYVA_API_KEYS") as caught:
        key_digests({"RAYVA_API_KEYS": f"first, {key}"})
    assert key not in str(caught.value)


def test_healthz_needs_no_key(url: str) -> None:
    with urllib.request.urlopen(f"{url}/healthz") as response:
        assert json.load(response) == {"status": "ok", "model": "tiny"}


def test_concurrent_requests_all_get_their_own_answer(url: str, assistant: Assistant) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    conversations = [question("What?", data_uri(picture(seed))) for seed in range(6)]

    async def ask_all() -> list[str | None]:
        responses = await asyncio.gather(
            *(
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
                for messages in conversations
            )
        )
        return [response.choices[0].message.content for response in responses]

    assert asyncio.run(ask_all()) == [direct_answer(assistant, messages, 8) for messages in conversations]
