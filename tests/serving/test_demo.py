"""The end of the demo: a held-out picture is chosen, written for people, and asked about."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayva.data.schema import ImageRecord, Question
from rayva.data.tables import write_records
from rayva.errors import ServingError
from rayva.model.folder import Assistant
from rayva.orchestration.demo import ask_served_model, choose_exam, write_picture
from rayva.recipes.schema import Serving
from rayva.storage import Storage
from tests.serving.conftest import data_uri, picture, question
from tests.serving.test_api import direct_answer

DATA = "steps/data-0"


def make_tables(storage: Storage, kinds: dict[str, list[str]], splits: dict[str, str]) -> None:
    images = [
        ImageRecord(name, split, content=picture(seed))  # type: ignore[arg-type]
        for seed, (name, split) in enumerate(splits.items())
    ]
    questions = [
        Question(f"{name}-{index}", name, "grounding", kind, f"{kind} of {name}?", ("yes", "no"))
        for name, of_image in kinds.items()
        for index, kind in enumerate(of_image)
    ]
    write_records(storage, f"{DATA}/images.parquet", ImageRecord, images)
    write_records(storage, f"{DATA}/questions.parquet", Question, questions)


def test_the_picture_is_held_out_and_has_questions_of_different_kinds(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    kinds = {
        "a": ["colour", "shape", "place"],
        "b": ["colour", "colour", "colour"],
        "c": ["colour", "colour", "shape", "place", "count"],
    }
    make_tables(storage, kinds, {"a": "train", "b": "test", "c": "test"})
    exam = choose_exam(storage, DATA)
    assert exam.picture == picture(2)
    assert [asked for asked, _ in exam.questions] == ["colour of c?", "shape of c?", "place of c?"]


def test_a_run_without_such_a_picture(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    make_tables(storage, {"a": ["colour", "shape", "place"]}, {"a": "validation"})
    with pytest.raises(ServingError, match="no test picture"):
        choose_exam(storage, DATA)


def test_the_picture_is_written_as_it_is_and_enlarged(tmp_path: Path) -> None:
    plain, enlarged = write_picture(Storage(str(tmp_path)), picture(3))
    original = np.asarray(Image.open(io.BytesIO(picture(3))))
    assert np.array_equal(np.asarray(Image.open(plain)), original)
    large = Image.open(enlarged)
    assert large.size == (480, 360)
    assert np.array_equal(np.asarray(large)[::12, ::12], original)


@pytest.mark.ray
@pytest.mark.slow
def test_the_served_model_is_asked_and_the_answers_are_kept(
    tmp_path: Path, model_folder: Path, assistant: Assistant
) -> None:
    import mlflow

    storage = Storage(str(tmp_path / "run"))
    make_tables(storage, {"a": ["colour", "shape", "place"]}, {"a": "test"})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_registered_model("rayva-tiny")
    client.create_model_version("rayva-tiny", str(model_folder))
    summary = {
        "stages": {"data": {"folder": storage.uri(DATA)}},
        "model": {"name": "rayva-tiny", "version": "1", "aliases": ["candidate"]},
        "mlflow": {"tracking_uri": uri},
        "served": None,
    }
    storage.write_json("summary.json", summary)
    lines = ask_served_model(storage, Serving(max_new_tokens=16))
    served = json.loads((tmp_path / "run" / "summary.json").read_text())["served"]
    assert Path(served["picture"]).read_bytes()[:4] == b"\x89PNG"
    assert [turn["question"] for turn in served["answers"]] == [
        f"{kind} of a?" for kind in ("colour", "shape", "place")
    ]
    for turn in served["answers"]:
        expected = direct_answer(assistant, question(turn["question"], data_uri(picture(0))), 16)
        assert turn["answer"] == expected
    assert "picture-enlarged.png" in lines[0]
