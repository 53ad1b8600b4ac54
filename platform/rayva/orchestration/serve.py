"""The endpoint as a Ray Serve application: an ingress and autoscaling model replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from PIL import Image
from pydantic import Field, ValidationError
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError, TaskUnschedulableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from rayva.errors import ServingError
from rayva.recipes.schema import Config, Dtype, Serving
from rayva.serving.api import ApiSettings, build_api
from rayva.serving.engine import BuiltinEngine, Piece
from rayva.serving.errors import ApiError
from rayva.serving.keys import key_digests
from rayva.serving.schema import Sampling
from rayva.serving.source import ModelSource, find_model, local_folder
from rayva.text.conversation import Message

MODEL_DEPLOYMENT = "model"
INGRESS_DEPLOYMENT = "ingress"
_ONGOING_PER_REPLICA = 2
_QUEUED_PER_INGRESS = 64
_LONGEST_ANSWER_SECONDS = 120.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class EndpointArgs(Config):
    """What the application takes: `args` in serve/config.yaml."""

    model: str
    """A model folder, the storage root of a run, or models:/NAME@ALIAS."""
    tracking_uri: str | None = None
    """Where the model registry is; MLFLOW_TRACKING_URI where it is not given."""
    model_name: str | None = None
    """The name that clients use; None takes the registered one, or the folder's."""
    dtype: Dtype = "float32"
    serving: Serving = Field(default_factory=Serving)


class Replica:
    """One copy of the model."""

    def __init__(self, source: ModelSource, dtype: Dtype, gpu: bool) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from rayva.model.folder import load_assistant

        disable_progress_bar()
        folder, self._storage = local_folder(source)
        assistant = load_assistant(folder, "cuda" if gpu else "cpu", getattr(torch, dtype))
        self._engine = BuiltinEngine(assistant)

    async def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], sampling: Sampling
    ) -> AsyncIterator[Piece]:
        """See `rayva.serving.engine.Engine.generate`."""
        async for piece in self._engine.generate(messages, images, sampling):
            yield piece


class RemoteEngine:
    """The engine protocol over the model's replicas."""

    def __init__(self, model: DeploymentHandle, application: str) -> None:
        self._model = model.options(stream=True, method_name="generate")
        self._application = application

    async def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], sampling: Sampling
    ) -> AsyncIterator[Piece]:
        """See `rayva.serving.engine.Engine.generate`."""
        try:
            async for piece in self._model.remote(messages, images, sampling):
                yield piece
        except BackPressureError as error:
            raise ApiError(
                429, "too many requests are waiting; try again later", None, "overloaded"
            ) from error
        except (
            RayActorError,
            TaskUnschedulableError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        ) as error:
            raise ApiError(503, "the model is not available just now", None, "model_unavailable") from error

    async def ready(self) -> bool:
        """Whether a replica of the model is running."""
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(self._application)
        if application is None or application.status == ApplicationStatus.DELETING:
            return False
        replicas = application.deployments[MODEL_DEPLOYMENT].replica_states
        return bool(replicas.get("RUNNING", 0))


class Ingress:
    """HTTP, keys, limits and the media guard; only whole and checked requests reach the model."""

    def __init__(self, model: DeploymentHandle, settings: ApiSettings) -> None:
        self._model, self._settings = model, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        application = serve.get_replica_context().app_name
        api = build_api(RemoteEngine(self._model, application), self._settings)
        api.add_middleware(Departures)
        return api


class Departures:
    """Tells the application of a client that left in ASGI's way.

    Serve cancels such a request, and an application that waits for the client then gets an exception from it,
    which would be logged as a failure.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_leave() -> AsgiMessage:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_leave, send)


def build_application(args: dict[str, Any]) -> serve.Application:
    """The application for `serve.run`, `serve run` and `serve deploy`.

    Raises:
        ServingError: an unknown or wrong argument, or no such model.
    """
    try:
        checked = EndpointArgs.model_validate(args)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ServingError(
            f"the endpoint's argument {place!r}: {fault['msg']}", "see serve/config.yaml"
        ) from None
    limits = checked.serving
    source = find_model(checked.model, checked.tracking_uri)
    settings = ApiSettings(checked.model_name or source.name, limits, key_digests())
    model = _model_deployment(limits).bind(source, checked.dtype, limits.gpus_per_replica > 0)
    return _ingress_deployment().bind(model, settings)


def _model_deployment(limits: Serving) -> serve.Deployment:
    return serve.deployment(
        Replica,
        name=MODEL_DEPLOYMENT,
        # The built-in engine answers one request at a time; a second one waits in the replica.
        max_ongoing_requests=_ONGOING_PER_REPLICA,
        max_queued_requests=_QUEUED_PER_INGRESS,
        ray_actor_options={"num_cpus": limits.cpus_per_replica, "num_gpus": limits.gpus_per_replica},
        autoscaling_config={
            "min_replicas": limits.min_replicas,
            "max_replicas": max(limits.min_replicas, limits.max_replicas),
            "target_ongoing_requests": _ONGOING_PER_REPLICA,
        },
        # An answer under way is finished before its replica goes.
        graceful_shutdown_timeout_s=_LONGEST_ANSWER_SECONDS,
        logging_config=_QUIET,
    )


def _ingress_deployment() -> serve.Deployment:
    return serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=2 * _QUEUED_PER_INGRESS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_LONGEST_ANSWER_SECONDS,
        logging_config=_QUIET,
    )
