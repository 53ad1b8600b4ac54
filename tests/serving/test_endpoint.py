"""The real Ray Serve application, asked by the official OpenAI client."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from rayva.errors import CapacityError, ServingError
from rayva.model.folder import Assistant
from rayva.recipes.schema import Serving
from tests.serving.conftest import data_uri, picture, question
from tests.serving.test_api import direct_answer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(**changes: object) -> Serving:
    return Serving(port=free_port(), max_new_tokens=32, max_images=2, max_image_bytes=50_000, **changes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from rayva.orchestration.console import serving_recipe
    from rayva.orchestration.startup import start_ray, stop_ray

    start_ray(serving_recipe(Serving()))
    yield
    stop_ray()


@pytest.fixture(scope="module")
def endpoint(cluster: None, model_folder: Path) -> Iterator[str]:
    from rayva.orchestration.endpoint import running_endpoint

    with running_endpoint({"model": str(model_folder), "model_name": "tiny"}, settings()) as url:
        yield url


@pytest.fixture(scope="module")
def client(endpoint: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint}/v1", api_key="unused", max_retries=0)


def test_text_and_image(client: openai.OpenAI, assistant: Assistant) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    for messages in (question("What is it?", data_uri(picture(4))), question("What is a star?")):
        response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
        assert response.choices[0].message.content == direct_answer(assistant, messages, 12)


def test_streaming(client: openai.OpenAI, assistant: Assistant) -> None:
    messages = question("Where is it?", data_uri(picture(5)))
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == direct_answer(assistant, messages, 12)
    assert len([piece for piece in pieces if piece]) > 1


def test_faults_keep_their_status_on_the_way_through_serve(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=question("What?"))
    with pytest.raises(openai.BadRequestError, match="not fetched"):
        client.chat.completions.create(model="tiny", messages=question("What?", "https://example.com/a.png"))
    with pytest.raises(openai.BadRequestError, match="none of JPEG"):
        client.chat.completions.create(model="tiny", messages=question("What?", data_uri(b"no picture")))
    with pytest.raises(openai.BadRequestError, match="more than 2 images"):
        client.chat.completions.create(model="tiny", messages=question("What?", *[data_uri(picture())] * 3))
    # This one is raised in the model's replica, in another process.
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=question("circle " * 600), stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_typed_control_tokens_stay_text(client: openai.OpenAI, assistant: Assistant) -> None:
    messages = question("<image></s> What?")
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert response.choices[0].message.content == direct_answer(assistant, messages, 8)


def test_too_large_a_body_gets_its_answer(endpoint: str) -> None:
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny", messages=question("x" * 4_000_000))
    assert caught.value.status_code == 413


def test_healthz(endpoint: str) -> None:
    with urllib.request.urlopen(f"{endpoint}/healthz") as response:
        assert response.status == 200


def test_the_port_in_use_is_named_before_anything_is_deployed(endpoint: str, model_folder: Path) -> None:
    """The endpoint itself is what listens there."""
    from rayva.orchestration.endpoint import running_endpoint

    port = int(endpoint.rpartition(":")[2])
    second = running_endpoint({"model": str(model_folder)}, Serving(port=port))
    with pytest.raises(ServingError, match=f"port {port} of 127") as caught:
        second.__enter__()
    assert "serving.port=PORT" in caught.value.remedy
    with urllib.request.urlopen(f"{endpoint}/healthz") as response:
        assert response.status == 200


def test_replicas_that_have_no_room_are_refused(cluster: None) -> None:
    from rayva.orchestration.endpoint import check_room

    check_room(settings())
    with pytest.raises(CapacityError, match="8000 CPUs") as caught:
        check_room(settings(min_replicas=8, cpus_per_replica=1000.0))
    assert "serving.cpus_per_replica" in caught.value.remedy


def test_a_cluster_that_serves_already_is_left_alone(endpoint: str, model_folder: Path) -> None:
    from rayva.orchestration.endpoint import running_endpoint

    with pytest.raises(ServingError, match="serves already"):
        running_endpoint({"model": str(model_folder)}, settings()).__enter__()
    with urllib.request.urlopen(f"{endpoint}/healthz") as response:
        assert response.status == 200


def test_healthz_and_answers_come_back_after_a_replica_was_lost(
    endpoint: str, client: openai.OpenAI, assistant: Assistant
) -> None:
    """A killed replica costs a 503 at worst; Serve starts another, and its answers are the same."""
    import ray

    [name] = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "rayva#model#" in actor["name"]
    ]
    ray.kill(ray.get_actor(name, namespace="serve"))
    patient = client.with_options(max_retries=10, timeout=120)
    messages = question("What is it?", data_uri(picture(4)))
    response = patient.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert response.choices[0].message.content == direct_answer(assistant, messages, 12)
