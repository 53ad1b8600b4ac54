"""The model registry: a version leads to the model's folder; its files are never uploaded.

What is registered is a reference (JSON) and tags. No pickle, and no copy of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayva.redaction import redact
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, check_uri, is_server
from rayva.tracking.outbox import Rejected, ServerAway
from rayva.tracking.server import MlflowServer, ask, make_client
from rayva.tracking.sqlite import sqlite_file

CANDIDATE = "candidate"
CHAMPION = "champion"
DIGEST_TAG = "rayva.digest"
MODEL_TAG = "rayva.model"
"""Where the model folder lies: a local path or fsspec URI. The version's own source may be a reference."""
REFERENCE = "rayva-model.json"
_ADDRESS = "check the name and the alias, and give the registry's address with --tracking-uri"


@dataclass(frozen=True)
class Registered:
    """A version in the registry, and all aliases that point at it."""

    name: str
    version: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where to register: the store, and the MLflow run that made the model."""

    uri: str
    experiment: str
    storage: Storage
    run_id: str


def register(
    place: Place, name: str, model: str, tags: Mapping[str, str], about: Mapping[str, Any], champion: bool
) -> Registered:
    """Makes a version of the registered model `name`, or takes the one that has this digest and folder.

    A version with the same digest in another folder is another one: that folder may go, and this one stay.
    The newest model always gets the alias `candidate`, and `champion` if it passed the gate.

    Args:
        model: local path or URI of the model folder.
        tags: must hold `DIGEST_TAG`.
        about: JSON data kept beside the run as `model/rayva-model.json`.

    Raises:
        TrackingError: the server is away or refuses; running the job again goes on here.
    """
    server = MlflowServer(place.uri, place.experiment, place.storage)
    try:
        server.connect()
        version = _find(server, name, tags[DIGEST_TAG], model)
        if version is None:
            version = _create(server, place, name, model, tags, about)
        for alias in (CANDIDATE, CHAMPION) if champion else (CANDIDATE,):
            _set_alias(server, name, alias, version)
        aliases = server.ask(lambda: server.client.get_model_version(name, version)).aliases
    except ServerAway as error:
        raise TrackingError(
            f"The model could not be registered: {redact(place.uri)} cannot be reached ({error}).",
            "start the tracking server and run the same command again; all other steps stay finished",
        ) from error
    except Rejected as error:
        raise TrackingError(
            f"The registry at {redact(place.uri)} does not take the model {name!r}: {error}",
            "set tracking.model_name to another name, or ask whoever runs the server",
        ) from error
    return Registered(name, version, tuple(sorted(aliases)))


def registered_folder(uri: str, name: str, *, alias: str | None = None, version: str | None = None) -> str:
    """Where the folder of a registered model lies, by an alias or a version; nothing is written.

    Raises:
        TrackingError: there is no such store, it cannot be reached, or it has no such version.
    """
    return _folder(_entry(uri, name, alias, version))


def aliases_now(uri: str, name: str, version: str) -> list[str]:
    """All aliases that point at a version now; those that it had when it was registered may have moved on.

    Raises:
        TrackingError: as `registered_folder`.
    """
    return sorted(_entry(uri, name, None, version).aliases)


def _entry(uri: str, name: str, alias: str | None, version: str | None) -> Any:
    """MLflow's entry of a version."""
    wanted = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    shown = redact(uri)
    file = sqlite_file(check_uri(uri))
    if file is not None and not file.exists():
        raise TrackingError(f"The registry {shown} with {wanted} is not there.", _ADDRESS)

    def find() -> Any:
        client = make_client(uri)
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)

    try:
        return ask(find, lambda: make_client(uri).search_registered_models(max_results=1))
    except ServerAway as error:
        raise TrackingError(
            f"The registry {shown} with {wanted} cannot be reached ({error}).",
            "start the tracking server, or check its address, user and password",
        ) from error
    except Rejected as error:
        raise TrackingError(f"The registry {shown} does not give {wanted}: {error}", _ADDRESS) from error


def _folder(entry: Any) -> str:
    return str(entry.tags.get(MODEL_TAG, entry.source)).removeprefix("file://")


def _find(server: MlflowServer, name: str, digest: str, model: str) -> str | None:
    """The newest version of the model with this digest that was registered from this folder."""
    found = server.ask(lambda: server.client.search_model_versions(f"name = '{name}'"))
    here = model.removeprefix("file://")
    same = [
        int(entry.version)
        for entry in found
        if entry.tags.get(DIGEST_TAG) == digest and _folder(entry) == here
    ]
    return str(max(same)) if same else None


def _create(
    server: MlflowServer,
    place: Place,
    name: str,
    model: str,
    tags: Mapping[str, str],
    about: Mapping[str, Any],
) -> str:
    client = server.client
    text = json.dumps({**about, "model": model, "tags": dict(tags)}, indent=1)
    server.ask(lambda: client.log_text(place.run_id, text, f"model/{REFERENCE}"))
    if not server.ask(lambda: client.search_registered_models(f"name = '{name}'")):
        server.ask(lambda: client.create_registered_model(name))
    # A tracking server refuses paths on other machines' disks; there, the reference stands in.
    unreachable = is_server(place.uri) and place.storage.is_local
    source = f"runs:/{place.run_id}/model" if unreachable else model
    made = server.ask(
        lambda: client.create_model_version(
            name, source, run_id=place.run_id, tags={MODEL_TAG: model, **tags}
        )
    )
    return str(made.version)


def _set_alias(server: MlflowServer, name: str, alias: str, version: str) -> None:
    server.ask(lambda: server.client.set_registered_model_alias(name, alias, version))
