"""Brings the endpoint up on the Ray cluster of this process, and takes it down again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _set_global_client

from rayva.errors import CapacityError, ServingError
from rayva.orchestration.serve import build_application
from rayva.recipes.schema import Serving
from rayva.serving.address import check_exposure, check_port

APPLICATION = "rayva"
_PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def check_room(serving: Serving) -> None:
    """Serve would wait without end for replicas that the cluster has no room for.

    Raises:
        CapacityError: names what the replicas need, what there is, and the settings to change.
    """
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    there = ray.cluster_resources()
    each = {"CPU": serving.cpus_per_replica, "GPU": serving.gpus_per_replica}
    for kind, amount in each.items():
        needed, most = serving.min_replicas * amount, max(there.get(kind, 0.0), limits.get(kind, 0.0))
        if needed > most:
            setting = f"serving.{kind.lower()}s_per_replica"
            raise CapacityError(
                f"{serving.min_replicas} replicas need {needed:g} {kind}s, but the cluster has {most:g}.",
                f"lower serving.min_replicas or {setting}, or add nodes",
            )


@contextlib.contextmanager
def running_endpoint(args: dict[str, Any], serving: Serving) -> Iterator[str]:
    """Deploys the application and waits until it is healthy; yields its address, and ends it after.

    Ray must be running. Serve takes its address once per cluster, so that the cluster must not serve
    yet. A cluster that lives only as long as this process takes the endpoint along when it ends.

    Raises:
        ServingError: the port is in use, the model cannot be found, or it does not come up.
    """
    check_exposure(serving.host)
    check_port(serving.host, serving.port)
    if serve.status().proxies:
        raise ServingError(
            "This Ray cluster serves already, and has one address for all that it serves.",
            "deploy beside it with: serve deploy serve/config.yaml",
        )
    check_room(serving)
    application = build_application({**args, "serving": serving.model_dump()})
    try:
        _start_serve(serving)
        _deploy(application)
        yield f"http://{_for_url(serving.host)}:{serving.port}"
    finally:
        if _cluster_given():
            serve.shutdown()
        else:
            # Serve goes with the cluster. This process must forget it, or it would ask a dead controller.
            _set_global_client(None)


def _cluster_given() -> bool:
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def _start_serve(serving: Serving) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": serving.host, "port": serving.port},
            # What goes wrong is told by the application's status; the rest is for Serve's developers.
            logging_config={"log_level": "ERROR", "enable_access_log": False},
            # A busy machine must not make Serve give up its proxy while it is still importing.
            controller_options={"runtime_env": {"env_vars": _PATIENCE}},
        )
    except RayError as error:
        raise ServingError(
            f"Ray Serve did not come up: {str(error).splitlines()[0]}",
            "see Serve's logs in the session folder of Ray (logs/serve), and try again",
        ) from error


def _deploy(application: serve.Application) -> None:
    # Serve tells of a failed deployment with a bare RuntimeError; its status has the reason.
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(
            f"The endpoint did not come up: {_reason(error)}",
            "check that the model folder is complete, and that the cluster has room for a replica",
        ) from error


def _reason(error: RuntimeError) -> str:
    """The last line of each failed deployment's message, which names the exception."""
    status = serve.status().applications.get(APPLICATION)
    if status is None:
        return str(error)
    messages = [deployment.message for deployment in status.deployments.values()] + [status.message]
    lines = [message.strip().splitlines()[-1] for message in messages if message.strip()]
    return "; ".join(dict.fromkeys(lines)) or str(error)


def _for_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
