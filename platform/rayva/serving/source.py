"""Which model to serve: a folder, a whole run, or an alias of the registry. Quick to import.

runs/demo                      a storage root: the model that its job registered
runs/demo/steps/.../model      a Rayva model folder (local path or fsspec URI)
models:/rayva-tiny@champion    an alias of the MLflow registry; models:/rayva-tiny/3 a version
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rayva.errors import ServingError
from rayva.redaction import MASK
from rayva.steps import SUMMARY, command_to_go_on, read_summary
from rayva.storage import Storage
from rayva.tracking.address import own_store
from rayva.tracking.registry import registered_folder

MODEL_FILE = "rayva.json"
_TRACKING_URI = "MLFLOW_TRACKING_URI"
_REGISTRY = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ModelSource:
    """Where a model folder lies (local path or fsspec URI), and the name to serve it by."""

    folder: str
    name: str


def find_model(reference: str, tracking_uri: str | None = None) -> ModelSource:
    """Resolves what a person names to a model folder.

    Args:
        tracking_uri: where the registry is. None: a storage root knows its own; else MLFLOW_TRACKING_URI.

    Raises:
        ServingError: there is no such model; names what was looked for.
        TrackingError: the registry cannot be reached, or does not know the model.
    """
    if reference.startswith("models:"):
        return _registered(reference, tracking_uri)
    storage = Storage(reference)
    if storage.exists(MODEL_FILE):
        return ModelSource(storage.root, _folder_name(storage))
    if storage.exists(SUMMARY):
        return _of_run(storage, tracking_uri)
    raise ServingError(
        f"{reference} holds neither {MODEL_FILE} (a model folder) nor {SUMMARY} (a run)",
        "give a model folder, the storage root of a run, or models:/NAME@ALIAS",
    )


def _folder_name(storage: Storage) -> str:
    name = storage.root.rstrip("/").rpartition("/")[2]
    return name or "rayva"


def _of_run(storage: Storage, tracking_uri: str | None) -> ModelSource:
    """The version of the registry that a run registered."""
    summary = read_summary(storage)
    model, tracking = summary.get("model"), summary.get("mlflow")
    if not model or not tracking:
        raise ServingError(
            f"the run in {storage.root} has not registered a model yet",
            f"finish it with: {command_to_go_on(storage)}",
        )
    kept = own_store(storage) or str(tracking["tracking_uri"])
    uri = tracking_uri or (None if MASK in kept else kept) or os.environ.get(_TRACKING_URI)
    if uri is None:
        raise ServingError(
            f"the run in {storage.root} keeps the address of its model registry without the secrets in it: "
            f"{kept}",
            f"give the whole address with --tracking-uri or {_TRACKING_URI}",
        )
    return _registered(f"models:/{model['name']}/{model['version']}", uri, storage)


def _registered(reference: str, tracking_uri: str | None, run: Storage | None = None) -> ModelSource:
    """A version of the registry; if `run` has registered it, from where the run is now."""
    found = _REGISTRY.fullmatch(reference)
    if found is None:
        raise ServingError(f"{reference} names no model", "write models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = tracking_uri or os.environ.get(_TRACKING_URI)
    if uri is None:
        raise ServingError(
            f"nothing says where the registry with {reference} is",
            f"give its address with --tracking-uri or {_TRACKING_URI}, such as sqlite:////RUN/mlflow.db",
        )
    place = registered_folder(uri, found["name"], alias=found["alias"], version=found["version"])
    storage = Storage((run and _moved(place, run)) or place)
    if not storage.exists(MODEL_FILE):
        raise ServingError(
            f"{reference} was registered from {place}, where there is no {MODEL_FILE} any more",
            f"restore the folder, or register the model again: {_register_again(run)}",
        )
    return ModelSource(storage.root, found["name"])


def _register_again(run: Storage | None) -> str:
    """The command that does; of a model that is known by its name alone, the run is not."""
    if run is not None:
        return command_to_go_on(run, "--force", "register")
    return "python pipelines/full.py --config RUN/recipe.json --storage RUN --force register"


def _moved(place: str, run: Storage) -> str | None:
    """Where `place`, a model folder of a run, is in `run`, which may have been moved; None if it is not."""
    _, steps, inside = place.rpartition("/steps/")
    rel = f"steps/{inside}"
    return run.uri(rel) if steps and run.exists(f"{rel}/{MODEL_FILE}") else None


def local_folder(source: ModelSource) -> tuple[Path, Storage]:
    """A local copy of the model folder. It lives as long as the returned storage does."""
    storage = Storage(source.folder)
    return storage.localize(""), storage
