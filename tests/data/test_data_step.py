"""The data step writes all tables, counts what it refuses, and notices changed input."""

import json
from itertools import pairwise
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
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
    beside = "images of data.pretrain_json"
    assert before.keys() == {"data.pretrain_json", "data.finetune_json", "data.finetune_images", beside}
    assert fingerprint(recipe) == before
    (tmp_path / "in" / "0.png").write_bytes(b"another and longer picture")
    with_picture = fingerprint(recipe)
    assert {name for name in before if before[name] != with_picture[name]} == {
        "data.finetune_images",
        beside,
    }
    content = (tmp_path / "in" / "pretrain.json").read_text()
    (tmp_path / "in" / "pretrain.json").write_text(content + "\n")
    assert fingerprint(recipe)["data.pretrain_json"] != before["data.pretrain_json"]
    (tmp_path / "in" / "pretrain.json").unlink()
    with pytest.raises(DataError, match="pretrain_json"):
        fingerprint(recipe)


def captions_rows(folder):
    rows = [{"image": name, "caption": "A cat."} for name in ("a.jpg", "sub/b.png")]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return Data(source="captions", captions=str(folder / "captions.jsonl"))


def llava_rows(folder, **more):
    rows = [row("<image>\nWhat?", "A cat.", image=name) for name in ("a.jpg", "sub/b.png")]
    (folder / "rows.json").write_text(json.dumps([*rows, 7, row("q", "a")]))
    return Data(source="llava", pretrain_json=str(folder / "rows.json"), **more)


def mixed_rows(folder):
    llava_rows(folder)
    return Data(source="llava", finetune_mix=[{"path": str(folder / "rows.json")}])


def table_rows(folder):
    table = pa.table({"image": ["a.jpg", "sub/b.png"], "caption": ["A cat.", "A dog."]})
    pq.write_table(table, folder / "captions.parquet")
    return Data(source="captions", captions=str(folder / "captions.parquet"))


@pytest.mark.parametrize("rows", [captions_rows, llava_rows, mixed_rows, table_rows])
def test_images_beside_their_rows_count_and_nothing_else_there(rows, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        (folder / name).write_bytes(b"broken")
    recipe = Recipe(name="mine", data=rows(folder))
    digests = [fingerprint(recipe)]
    (folder / "runs").mkdir()
    for name in ("job.lock", "runs/report.png", "runs/x.jpg", "c.png"):
        (folder / name).write_bytes(b"no image of these rows")
    assert fingerprint(recipe) == digests[0]
    for name in ("a.jpg", "sub/b.png"):
        (folder / name).write_bytes(b"mended in place")
        digests.append(fingerprint(recipe))
    (folder / "a.jpg").unlink()
    digests.append(fingerprint(recipe))
    assert len({json.dumps(digest) for digest in digests}) == 4
    for before, after in pairwise(digests):
        (changed,) = [name for name in before if before[name] != after[name]]
        assert changed.startswith("images of data.")
    folder.rename(tmp_path / "moved")
    assert fingerprint(Recipe(name="mine", data=rows(tmp_path / "moved"))) == digests[-1]


def test_rows_without_images_beside_them_have_no_such_line(tmp_path):
    table = pa.table({"image": [b"bytes"], "caption": ["A cat."]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "far.json").write_text(json.dumps([row("q", "a"), row("q", "a", image="s3://b/x.jpg")]))
    for data in (
        Data(source="captions", captions=str(tmp_path / "t.parquet")),
        Data(source="llava", pretrain_json=str(tmp_path / "far.json")),
        llava_rows(tmp_path, pretrain_images=str(tmp_path)),
    ):
        assert not any(name.startswith("images of") for name in fingerprint(Recipe(name="mine", data=data)))


def test_images_beside_their_rows_on_another_file_system():
    system = fsspec.filesystem("memory")
    system.pipe("/beside/a.jpg", b"broken")
    system.pipe("/beside/rows.json", json.dumps([row("<image>\nq", "a", image="a.jpg")]).encode())
    recipe = Recipe(name="mine", data=Data(source="llava", finetune_json="memory://beside/rows.json"))
    before = fingerprint(recipe)
    system.pipe("/beside/a.jpg", b"mended in place")
    assert fingerprint(recipe) != before


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


def test_csv_that_older_code_read_is_read_again(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,A dog\n")
    for captions in (tmp_path, tmp_path / "captions.csv"):
        recipe = Recipe(name="r", data=Data(source="captions", captions=str(captions)))
        assert fingerprint(recipe)["rows of CSV"] == "strict"
