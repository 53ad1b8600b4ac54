"""Generated data as training reads it: the files that go along, and what is held out."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from rayva.data.llava_json import build
from rayva.data.schema import IMAGE_PLACEHOLDER, Question, Sample
from rayva.data.tables import read_records
from rayva.instruct.contexts import Context
from rayva.orchestration.generate_training import caption_rows, held_out_rows
from rayva.recipes.schema import Data
from rayva.steps import StepFolder
from rayva.storage import Storage
from rayva.text.instructions import BRIEF

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["data.train_scenes=40", "data.test_scenes=8", "data.validation_scenes=2"]


def test_captions_are_the_contexts_own() -> None:
    contexts = [Context(f"c{n}", f"{n}.jpg", (f"First {n}.", f"Second {n}.")) for n in range(60)]
    rows = caption_rows(((c, f"folder/{c.image}") for c in contexts), seed=3)
    assert rows == caption_rows(((c, f"folder/{c.image}") for c in contexts), seed=3)
    assert [row["image"] for row in rows] == [f"folder/{n}.jpg" for n in range(60)]
    said = [[turn["value"] for turn in row["conversations"]] for row in rows]
    assert all(answer in c.captions for (_, answer), c in zip(said, contexts, strict=True))
    assert {answer.split()[0] for _, answer in said} == {"First", "Second"}
    assert {question.removeprefix(f"{IMAGE_PLACEHOLDER}\n") for question, _ in said} == set(BRIEF)


def test_questions_of_a_dataset_come_back_as_they_were(tmp_path: Path) -> None:
    asked = [
        Question("a", "i1", "grounding", "place", "Where is it?", ("It is in the top left, they say.",)),
        Question("b", "i2", "grounding", "count", "How many?", ("There are two of them in it.",), "number"),
    ]
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"picture")
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(held_out_rows(asked, {"i1": "1.png", "i2": "2.png"})))
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    data = Data(pretrain_json=str(nothing), finetune_json=str(nothing), held_out_json=str(held_out))
    back = {q.question_id: (q.kind, q.question, q.accepted, q.match) for q in build(data).questions}
    assert back == {q.question_id: (q.kind, q.question, q.accepted, q.match) for q in asked}


def _run(script: str, *arguments: str) -> str:
    job = subprocess.run(
        [sys.executable, f"pipelines/{script}.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stdout + job.stderr[-3000:]
    return job.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_two_commands_lead_to_data_whose_test_images_nobody_trains_on(tmp_path: Path) -> None:
    source = ["--input", "scenes", "--teacher", "symbolic", "--samples", "120"]
    said = _run("generate", "--storage", str(tmp_path / "instruct"), *source, *SIZES)
    [settings] = (tmp_path / "instruct").glob("steps/generate-*/train.yaml")
    assert f"--config {settings}" in said
    config = yaml.safe_load(settings.read_text())["data"]
    assert all(Path(path).exists() for key, path in config.items() if key != "source")
    _run("data", "--recipe", "tiny", "--storage", str(tmp_path / "run"), "--config", str(settings))
    storage = Storage(str(tmp_path / "run"))
    [made] = (tmp_path / "run").glob("steps/data-*")
    folder = StepFolder(storage, "data", json.loads((made / "manifest.json").read_text())["digest"])
    trained = {
        image
        for name in ("pretrain", "finetune")
        for sample in read_records(storage, folder.join(f"{name}.parquet"), Sample)
        for image in sample.image_ids
    }
    questions = list(read_records(storage, folder.join("questions.parquet"), Question))
    tested = {question.image_id for question in questions}
    assert (len(trained), len(tested)) == (40, 8)
    assert len(questions) > 12
    assert len(Counter(question.kind for question in questions)) > 3
    assert trained.isdisjoint(tested)

    def contents(folder: str) -> set[str]:
        return {hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}

    assert contents(config["finetune_images"]).isdisjoint(contents(config["held_out_images"]))
