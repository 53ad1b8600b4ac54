"""The step on a real cluster with a tiny random model: what it writes, and how it goes on after a stop."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from rayva.data.schema import ImageRecord, Question
from rayva.data.tables import write_records
from rayva.evaluation.metrics import ANSWERS
from rayva.features.shards import ShardWriter
from rayva.features.store import StoreLayout, prepare_store
from rayva.orchestration import entry, evaluate
from rayva.orchestration.pipeline import STEPS, StepContext, StepResult
from rayva.recipes import Recipe, resolve, to_dict
from rayva.recipes.schema import Evaluation, Scaling, Stage
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from rayva.tracking.noop import NoopTracker
from rayva.vision.towers import load_tower
from tests.export.tiny_model import SIDE, make_model_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]
IMAGES = 6


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers inherit the environment of the process that starts Ray.
        patch.setenv("PYTHONPATH", str(Path(evaluate.__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage on which the steps before the evaluation are finished; features both ways."""
    root = tmp_path_factory.mktemp("run")
    storage = Storage(str(root))
    pictures = [_picture(number) for number in range(IMAGES)]
    _data(storage, pictures)
    model = make_model_folder(root / "made")
    pretrain = folder(storage, "pretrain")
    lines = "".join(json.dumps({"step": s, "loss": 3 / s, "lr": 0.1}) + "\n" for s in range(1, 9))
    storage.write_bytes(pretrain.join("metrics.jsonl"), lines.encode())
    pretrain.finish({"left_out": {"image_quarantined": 2}}, {}, 61)
    finetune = folder(storage, "finetune")
    storage.upload(model, finetune.join("model"))
    finetune.finish({}, {}, 5, {"inputs": {"pretrain": pretrain.digest}})
    _features(storage, model, pictures)
    return storage


def folder(storage: Storage, name: str, variant: str = "") -> StepFolder:
    return StepFolder(storage, name, step_digest(name, {"variant": variant}, {}))


def _picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _data(storage: Storage, pictures: list[bytes]) -> None:
    data = folder(storage, "data")
    images = [ImageRecord(f"i{n}", "test", content=picture) for n, picture in enumerate(pictures)]
    images.append(ImageRecord("broken", "test", content=b"no picture"))
    questions = [
        Question(
            f"q{n}", f"i{n % IMAGES}", "grounding", "color", f"What is {'very ' * (n % 3)}red?", ("red",)
        )
        for n in range(12)
    ]
    questions.append(Question("q-broken", "broken", "grounding", "color", "What?", ("red",)))
    # One is far too long; the other fits without its image alone.
    for name, words in (("q-long", 5000), ("q-longer-with-image", 86)):
        text = "word " * words
        questions.append(Question(name, "i0", "grounding", "color", text, ("red",)))
    questions.append(Question("text/0", "", "text", "capital", "Capital?", ("Paris",)))
    counts = {
        "images": write_records(storage, data.join("images.parquet"), ImageRecord, images),
        "questions": write_records(storage, data.join("questions.parquet"), Question, questions),
    }
    data.finish({**counts, "quarantined": {"no_turns": 3}}, {}, 1)


def _features(storage: Storage, model: Path, pictures: list[bytes]) -> None:
    tower = load_tower(str(model / "vision"), "clip", -2, SIDE)
    layout = StoreLayout(tower.num_tokens, tower.hidden_size, tower.describe(), "float32")
    prepare_store(storage, layout)
    keys = [hashlib.sha256(picture).hexdigest() for picture in pictures]
    pixels = tower.preprocess([Image.open(io.BytesIO(picture)) for picture in pictures])
    with ShardWriter(storage, layout.rel, tower.num_tokens, tower.hidden_size, 100) as writer:
        writer.write(keys, tower.encode(pixels).half().numpy())
    table = pa.table({"image_id": [f"i{n}" for n in range(IMAGES)], "key": keys})
    outputs = {"images": IMAGES, "tokens": tower.num_tokens, "hidden": tower.hidden_size}
    for variant, store in (("stored", layout.rel), ("inline", None)):
        features = folder(storage, "features", variant)
        storage.makedirs(features.rel)
        pq.write_table(table, storage.path(features.join("image_keys.parquet")))
        features.finish({**outputs, "store": store, "quarantined": {"not_an_image": 1}}, {}, 2)


def make_recipe(epochs: float = 1.0, **settings: int) -> Recipe:
    return Recipe(
        name="test",
        finetune=Stage(precision="float32", epochs=epochs),
        scaling=Scaling(cpus_per_worker=1),
        evaluation=Evaluation(**{"batch_size": 13, "max_new_tokens": 4, "gallery": 3, **settings}),
    )


def run(storage: Storage, variant: str = "stored", **settings: int) -> StepResult:
    recipe = make_recipe(**settings)
    inputs = {step: folder(storage, step) for step in ("data", "finetune")}
    inputs["features"] = folder(storage, "features", variant)
    tracker = NoopTracker(recipe, storage)
    return evaluate.run(StepContext(recipe, storage, folder(storage, "evaluate", variant), inputs, tracker))


def rows(storage: Storage, variant: str = "stored") -> list[dict[str, object]]:
    table = pq.read_table(storage.path(folder(storage, "evaluate", variant).join("answers.parquet")))
    assert table.schema.equals(ANSWERS)
    found: list[dict[str, object]] = table.to_pylist()
    return sorted(found, key=lambda row: (row["question_id"], row["condition"]))


def test_the_step_asks_scores_and_reports(finished: Storage) -> None:
    result = run(finished)
    answers = rows(finished)
    assert len(answers) == 12 * 3 + 1
    assert any(row["answer"] for row in answers)
    right = {row["question_id"]: row["image_id"] for row in answers if row["condition"] == "right_image"}
    wrong = {row["question_id"]: row["image_id"] for row in answers if row["condition"] == "shuffled_images"}
    assert right.keys() == wrong.keys()
    assert all(right[question] != wrong[question] for question in right)
    assert result.outputs["grounding"]["questions"] == 12
    assert result.outputs["left_out"] == {"image_quarantined": 1, "too_long": 2}
    assert result.outputs["tasks"]["text"]["questions"] == 1
    assert result.outputs["passed"] is False
    assert finished.read_json(folder(finished, "evaluate", "stored").join("metrics.json")) == result.outputs
    names = {path.split("/", 2)[2] for path in result.artifacts}
    assert {"report.html", "curves/pretrain_loss.png", "gallery/000.png", "gallery/002.png"} <= names
    assert all(finished.exists(path) for path in result.artifacts)
    report = finished.read_bytes(folder(finished, "evaluate", "stored").join("report.html")).decode()
    assert "not_an_image" in report
    assert "too_long" in report
    assert "1 min 01 s" in report
    assert report.count("data:image/webp") >= 3


def test_the_report_tells_how_to_train_longer_with_all_settings_of_the_run(finished: Storage) -> None:
    run(finished)
    finished.write_json("recipe.json", to_dict(make_recipe()))  # as the job does
    report = finished.read_bytes(folder(finished, "evaluate", "stored").join("report.html")).decode()
    command = re.search(r"python pipelines/full.py (.*?finetune.epochs=2)", html.unescape(report))
    options = entry._parser(None, STEPS).parse_intermixed_args(shlex.split(command[1]))
    assert options.storage == finished.root
    assert resolve(options.recipe, options.config, options.overrides) == make_recipe(epochs=2.0)


def test_stored_and_inline_features_give_the_same_answers(finished: Storage) -> None:
    run(finished)
    run(finished, "inline")
    assert rows(finished, "stored") == rows(finished, "inline")


def test_an_interrupted_step_goes_on_and_asks_nothing_twice(finished: Storage) -> None:
    run(finished)
    whole = rows(finished)
    parts = Path(finished.path(folder(finished, "evaluate", "stored").join("parts")))
    names = sorted(path.name for path in parts.iterdir())
    assert len(names) == 4
    marked = json.loads((parts / names[0]).read_text())
    marked[0][3] = "kept from the first attempt"
    (parts / names[0]).write_text(json.dumps(marked))
    (parts / names[2]).unlink()
    run(finished)
    again = rows(finished)
    changed = [row for row in again if row not in whole]
    assert [row["answer"] for row in changed] == ["kept from the first attempt"]
    run(finished, batch_size=7)  # other batches: nothing of the old ones fits
    assert rows(finished) == whole
