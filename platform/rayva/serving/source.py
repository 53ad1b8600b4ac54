"""Which model to serve: a folder, a whole run, or an alias of the registry. Quick to import.

runs/demo                      a storage root: the model that its job registered
runs/demo/steps/.../model      a Rayva model folder (local path or fsspec URI)
models:/rayva-tiny@champion    an alias of the MLflow registry; models:/rayva-tiny/3 a version
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayva.errors import ServingError
from rayva.storage import Storage

SUMMARY = "summary.json"
MODEL_FILE = "rayva.json"
MODEL_TAG = "rayva.model"
"""Tag of a registered version: where its model folder lies. The version's own source may be a reference."""
_REGISTRY = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ModelSource:
    """Where a model folder lies (local path or fsspec URI), and the name to serve it by."""

    folder: str
    name: str


def find_model(reference: str, tracking_uri: str | None = None) -> ModelSource:
    """Resolves what a person names to a model folder.

    `tracking_uri` says where the registry is; a storage root knows its own.

    Raises:
        ServingError: there is no such model; names what was looked for.
    """
    if reference.startswith("models:"):
        return _registered(reference, tracking_uri)
    storage = Storage(reference)
    if storage.exists(MODEL_FILE):
        return ModelSource(storage.root, _folder_name(storage))
    if storage.exists(SUMMARY):
        return _of_run(storage)
    raise ServingError(
        f"{reference} holds neither {MODEL_FILE} (a model folder) nor {SUMMARY} (a run)",
        "give a model folder, the storage root of a run, or models:/NAME@ALIAS",
    )


def _folder_name(storage: Storage) -> str:
    name = storage.root.rstrip("/").rpartition("/")[2]
    return name or "rayva"


def _of_run(storage: Storage) -> ModelSource:
    """The model that a run registered; its `champion` if it has one."""
    summary: dict[str, Any] = storage.read_json(SUMMARY)
    model, tracking = summary.get("model"), summary.get("mlflow")
    if not model or not tracking:
        raise ServingError(
            f"the run in {storage.root} has not registered a model yet", "finish it with pipelines/full.py"
        )
    return _registered(f"models:/{model['name']}/{model['version']}", tracking["tracking_uri"])


def _registered(reference: str, tracking_uri: str | None) -> ModelSource:
    found = _REGISTRY.fullmatch(reference)
    if found is None:
        raise ServingError(f"{reference} names no model", "write models:/NAME@ALIAS or models:/NAME/VERSION")
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=tracking_uri)
    name, alias, version = found["name"], found["alias"], found["version"]
    try:
        entry = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, version)
        )
    except MlflowException as error:
        raise ServingError(
            f"the registry at {mlflow.get_tracking_uri() if tracking_uri is None else tracking_uri} "
            f"has no {reference}: {str(error).splitlines()[0]}",
            "check the name and the alias, and give the registry's address with --tracking-uri",
        ) from error
    place = str(entry.tags.get(MODEL_TAG, entry.source)).removeprefix("file://")
    storage = Storage(place)
    if not storage.exists(MODEL_FILE):
        raise ServingError(
            f"{reference} was registered from {place}, where there is no {MODEL_FILE} any more",
            "restore the folder, or register the model again",
        )
    return ModelSource(storage.root, name)


def local_folder(source: ModelSource) -> tuple[Path, Storage]:
    """A local copy of the model folder. It lives as long as the returned storage does."""
    storage = Storage(source.folder)
    return storage.localize(""), storage
