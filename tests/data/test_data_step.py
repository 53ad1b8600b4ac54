"""The data step writes all tables, counts what it refuses, and notices changed input."""

import json
from types import SimpleNamespace

import pytest

from rayva.data.schema import ImageRecord, Question, Rejected, Sample
from rayva.data.tables import read_records
from rayva.errors import DataError
from rayva.orchestration.data import fingerprint, run
from rayva.recipes.schema import Data, Recipe
from rayva.steps import StepFolder
from rayva.storage import Storage


def row(question, answer, **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = [f"{n}.png" for n in range(30)]
    for name in names:
        (folder / name).write_bytes(b"picture of " + name.encode())
    rows = [row("<image>\nWhat?", f"Number {n}.", image=n, id=n) for n in names]
    (folder / "pretrain.json").write_text(json.dumps(rows))
    (folder / "finetune.json").write_text(
        json.dumps([*rows, 7, {"id": "x"}, row("q", "a", image="gone.png")])
    )
    data = Data(
        source="llava",
        pretrain_json=str(folder / "pretrain.json"),
        finetune_json=str(folder / "finetune.json"),
        finetune_images=str(folder),
        test_fraction=0.3,
    )
    return Recipe(name="mine", data=data)


def run_step(recipe, root):
    storage = Storage(str(root))
    folder = StepFolder(storage, "data", "0" * 64)
    context = SimpleNamespace(recipe=recipe, storage=storage, folder=folder, inputs={}, tracker=None)
    return run(context), storage, folder


def test_all_tables_are_written_and_counted(recipe, tmp_path):
    result, storage, folder = run_step(recipe, tmp_path / "out")
    tables = {
        name: list(read_records(storage, folder.join(f"{name}.parquet"), kind))
        for name, kind in {
            "images": ImageRecord,
            "pretrain": Sample,
            "finetune": Sample,
            "questions": Question,
            "quarantine": Rejected,
        }.items()
    }
    outputs = result.outputs
    assert {name: outputs[name] for name in ("images", "pretrain", "finetune", "questions")} == {
        name: len(tables[name]) for name in ("images", "pretrain", "finetune", "questions")
    }
    assert outputs["images"] == 30
    assert outputs["pretrain"] == outputs["finetune"] == 30 - outputs["questions"]
    assert outputs["quarantined"] == {"not_an_object": 1, "no_conversations": 1, "missing_image": 1}
    assert len(tables["quarantine"]) == 3
    assert json.loads(json.dumps(outputs)) == outputs
    known = {image.image_id for image in tables["images"]}
    assert {i for s in (*tables["pretrain"], *tables["finetune"]) for i in s.image_ids} <= known
    assert {q.image_id for q in tables["questions"]} <= known


def test_two_runs_write_the_same_bytes(recipe, tmp_path):
    for name in ("a", "b"):
        run_step(recipe, tmp_path / name)
    files = sorted((tmp_path / "a").rglob("*.parquet"))
    assert len(files) == 5
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_a_stage_without_samples_is_an_error_with_the_reasons(recipe, tmp_path):
    (tmp_path / "in" / "finetune.json").write_text(json.dumps([7, 8]))
    with pytest.raises(DataError, match=r"no usable sample for finetune \(quarantined: 2 not_an_object\)"):
        run_step(recipe, tmp_path / "out")


def test_the_fingerprint_changes_with_files_and_folders_and_not_otherwise(recipe, tmp_path):
    before = fingerprint(recipe)
    assert before.keys() == {"data.pretrain_json", "data.finetune_json", "data.finetune_images"}
    assert fingerprint(recipe) == before
    (tmp_path / "in" / "0.png").write_bytes(b"another and longer picture")
    with_picture = fingerprint(recipe)
    assert {name for name in before if before[name] != with_picture[name]} == {"data.finetune_images"}
    content = (tmp_path / "in" / "pretrain.json").read_text()
    (tmp_path / "in" / "pretrain.json").write_text(content + "\n")
    assert fingerprint(recipe)["data.pretrain_json"] != before["data.pretrain_json"]
    (tmp_path / "in" / "pretrain.json").unlink()
    with pytest.raises(DataError, match="pretrain_json"):
        fingerprint(recipe)


def test_a_moved_folder_has_the_same_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"x")
    one = fingerprint(Recipe(name="r", data=Data(source="captions", captions=str(tmp_path / "a"))))
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(Recipe(name="r", data=Data(source="captions", captions=str(tmp_path / "b")))) == one


def test_captions_that_older_code_read_row_by_row_are_read_again(tmp_path):
    (tmp_path / "captions.jsonl").write_text("{}")
    data = Data(source="captions", captions=str(tmp_path))
    assert fingerprint(Recipe(name="r", data=data))["rows of captions"] == "by picture"


def test_built_in_scenes_need_no_input():
    assert fingerprint(Recipe(name="r", data=Data(source="scenes"))) == {}
