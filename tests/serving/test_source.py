"""From what a person names to the model folder that is served."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from rayva.errors import RecipeError, ServingError
from rayva.orchestration.console import serving_settings
from rayva.recipes.schema import Serving
from rayva.serving.address import check_exposure, check_port
from rayva.serving.source import find_model, local_folder
from rayva.tracking.address import TrackingError


def test_a_model_folder(model_folder: Path) -> None:
    source = find_model(str(model_folder))
    assert (source.folder, source.name) == (str(model_folder), "model")
    assert local_folder(source)[0] == model_folder


def test_a_folder_that_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=str(tmp_path)):
        find_model(str(tmp_path))


def test_a_run_that_has_not_got_that_far(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"stages": {}, "model": None, "mlflow": None}))
    with pytest.raises(ServingError, match="not registered a model yet"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("reference", ["models:", "models:/", "models:/x", "models:/x@", "models:/x/one"])
def test_a_reference_that_names_no_model(reference: str) -> None:
    with pytest.raises(ServingError, match="names no model"):
        find_model(reference)


def _run_of(folder: Path, tracking_uri: str, version: str = "1") -> str:
    folder.mkdir()
    summary = {
        "stages": {},
        "model": {"name": "rayva-tiny", "version": version},
        "mlflow": {"tracking_uri": tracking_uri},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_a_registry_that_nobody_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServingError, match="MLFLOW_TRACKING_URI"):
        find_model("models:/rayva-tiny@champion")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_keeps_its_registry_without_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = _run_of(tmp_path / "run", "postgresql://***@host/db")
    with pytest.raises(ServingError, match="MLFLOW_TRACKING_URI") as caught:
        find_model(run)
    assert "without the secrets" in caught.value.what
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/gone.db")
    with pytest.raises(TrackingError, match=r"gone\.db with models:/rayva-tiny/1 is not there"):
        find_model(run)
    assert not (tmp_path / "gone.db").exists()


@pytest.mark.slow
def test_a_registry_that_is_down_is_told_at_once_and_without_secrets() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TrackingError, match="connection refused") as caught:
        find_model("models:/rayva-tiny@champion", f"http://ann:s3cret@127.0.0.1:{port}")
    told = str(caught.value)
    assert f"http://***@127.0.0.1:{port} with models:/rayva-tiny@champion cannot be reached" in told
    assert "s3cret" not in told


@pytest.mark.slow
def test_an_alias_and_a_version_of_the_registry(model_folder: Path, tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_registered_model("rayva-tiny")
    version = client.create_model_version("rayva-tiny", str(model_folder)).version
    client.set_registered_model_alias("rayva-tiny", "champion", version)
    for reference in ("models:/rayva-tiny@champion", f"models:/rayva-tiny/{version}"):
        source = find_model(reference, uri)
        assert (source.folder, source.name) == (str(model_folder), "rayva-tiny")
    assert find_model(_run_of(tmp_path / "run", uri, version)).name == "rayva-tiny"
    hidden = _run_of(tmp_path / "hidden", "postgresql://***@host/db", version)
    assert find_model(hidden, uri).name == "rayva-tiny"
    with pytest.raises(TrackingError, match="candidate"):
        find_model("models:/rayva-tiny@candidate", uri)
    tags = {"rayva.model": str(model_folder)}
    client.create_model_version("rayva-tiny", str(tmp_path / "reference"), tags=tags)
    assert find_model("models:/rayva-tiny/2", uri).folder == str(model_folder)
    client.create_model_version("rayva-tiny", str(tmp_path / "gone"))
    with pytest.raises(ServingError, match="any more"):
        find_model("models:/rayva-tiny/3", uri)


def test_settings_of_the_endpoint_can_be_changed_and_others_cannot() -> None:
    changed = serving_settings(Serving(max_images=7), ["serving.port=8123", "serving.max_replicas=3"])
    assert (changed.port, changed.max_replicas, changed.max_images) == (8123, 3, 7)
    with pytest.raises(RecipeError, match="does not concern the endpoint"):
        serving_settings(Serving(), ["finetune.lr=1"])


def test_a_port_in_use_is_named_with_its_override() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} of 127") as caught:
            check_port("127.0.0.1", port)
    assert "serving.port=PORT" in str(caught.value)
    check_port("127.0.0.1", port)


def test_an_open_endpoint_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(host)
    for host in ("0.0.0.0", "10.0.0.1", "::", "somewhere"):
        with pytest.raises(ServingError, match=host):
            check_exposure(host)
    monkeypatch.setenv("RAYVA_API_KEYS", "secret")
    check_exposure("0.0.0.0")
