from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rayva.orchestration import register
from rayva.orchestration.pipeline import StepContext
from rayva.recipes import resolve
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from rayva.tracking.mlflow_tracker import JobTracker

pytestmark = pytest.mark.slow


def test_the_model_is_registered_with_its_digest_and_promoted_only_if_it_passed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    recipe = resolve("tiny", None, [])
    model = StepFolder(storage, "finetune", "f" * 64)
    storage.write_bytes(model.join("model", "rayva.json"), b"{}")
    storage.write_bytes(model.join("model", "language", "model.safetensors"), b"weights")
    model.finish({}, {}, 1, {"inputs": {"data": "d" * 64}})
    export = StepFolder(storage, "export", "e" * 64)
    export.finish({"path": "hf"}, {}, 1)
    tracker = JobTracker(recipe, storage)
    made = []
    for passed in (True, False):
        grounding = {"accuracy": 0.9, "accuracy_shuffled_images": 0.3, "accuracy_no_image": 0.3}
        evaluated = StepFolder(storage, "evaluate", step_digest("evaluate", {"passed": passed}, {}))
        evaluated.finish({"passed": passed, "why": "because", "grounding": grounding}, {}, 1)
        inputs = {"evaluate": evaluated, "finetune": model, "export": export}
        folder = StepFolder(storage, "register", step_digest("register", {"passed": passed}, {}))
        with tracker.step("register", folder, inputs):
            made.append(register.run(StepContext(recipe, storage, folder, inputs, tracker)).outputs)
        # Another model, so that the second one is a version of its own.
        storage.write_bytes(model.join("model", "projector.safetensors"), b"more weights")
    tracker.close("FINISHED")
    assert [(entry["version"], entry["aliases"]) for entry in made] == [
        ("1", ["candidate", "champion"]),
        ("2", ["candidate"]),
    ]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    champion = client.get_model_version_by_alias("rayva-tiny", "champion")
    assert str(champion.version) == "1"
    assert champion.source == storage.uri(model.join("model"))
    assert champion.tags["rayva.digest"] == made[0]["digest"]
    assert champion.tags["rayva.finetune"] == "f" * 64
    assert champion.tags["rayva.gate"] == "passed"
    assert champion.run_id == tracker.run_id


def test_the_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("model/b/weights", b"x")
    storage.write_bytes("model/a.json", b"y")
    files = register.file_digests(storage, "model")
    assert files == {
        "a.json": hashlib.sha256(b"y").hexdigest(),
        "b/weights": hashlib.sha256(b"x").hexdigest(),
    }
    listing = f"{files['a.json']}  a.json\n{files['b/weights']}  b/weights\n"
    assert register.folder_digest(files) == hashlib.sha256(listing.encode()).hexdigest()
    storage.write_bytes("model/a.json", b"z")
    assert register.folder_digest(register.file_digests(storage, "model")) != register.folder_digest(files)
