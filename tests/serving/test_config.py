"""serve/config.yaml, strictly: Serve itself drops a key that it does not know without a word."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from rayva.errors import ServingError
from rayva.orchestration.serve import EndpointArgs, build_application

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "serve" / "config.yaml"


def unknown_keys(model: type[BaseModel], content: Any, place: str = "") -> Iterator[str]:
    """Keys of `content` that `model`, or a model below it, has no field for."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{place}{key}"
            continue
        for below in models_in(field.annotation):
            for item in value if isinstance(value, list) else [value]:
                yield from unknown_keys(below, item, f"{place}{key}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's value, or an item of it, may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [model for part in get_args(annotation) for model in models_in(part)]
    return []


def load() -> dict[str, Any]:
    return yaml.safe_load(CONFIG.read_text())


def test_serve_accepts_the_file_and_knows_every_key() -> None:
    content = load()
    ServeDeploySchema.model_validate(content)
    assert list(unknown_keys(ServeDeploySchema, content)) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "http_option"),
        (("http_options",), "hots"),
        (("applications", 0), "routeprefix"),
    ],
)
def test_the_check_finds_what_serve_lets_pass(path: tuple[Any, ...], key: str) -> None:
    content = load()
    section = content
    for part in path:
        section = section[part]
    section[key] = "x"
    ServeDeploySchema.model_validate(content)
    assert [found.rpartition(".")[2] for found in unknown_keys(ServeDeploySchema, content)] == [key]


def test_the_endpoint_is_closed_by_default() -> None:
    assert load()["http_options"]["host"] == "127.0.0.1"


def test_the_arguments_are_the_endpoints_own() -> None:
    [application] = load()["applications"]
    args = EndpointArgs.model_validate(application["args"])
    assert args.serving.model_dump().items() >= application["args"]["serving"].items()
    assert application["import_path"] == "serve.app:app"
    assert application["runtime_env"]["env_vars"] == {"PYTHONPATH": "platform"}


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"model": "m", "modle": "m"},
        {"model": "m", "serving": {"min_replica": 1}},
        {"model": "m", "serving": {"min_replicas": "two"}},
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="the endpoint's argument"):
        build_application(args)


def test_the_application_has_the_recipes_replicas(model_folder: Path) -> None:
    from serve.app import app

    serving = {"min_replicas": 2, "max_replicas": 5, "cpus_per_replica": 0.5}
    ingress = app({"model": str(model_folder), "serving": serving})
    model = ingress._bound_deployment.init_args[0]._bound_deployment
    assert model.ray_actor_options["num_cpus"] == 0.5
    scaling = model._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
