"""A mix of datasets in the data step: names, ids that collide, shared pictures, counts and faults."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from rayva.data.schema import ImageRecord, Question, Rejected, Sample
from rayva.data.tables import read_records
from rayva.errors import DataError
from rayva.orchestration.data import fingerprint, load_bundle, run
from rayva.orchestration.pipeline import STEPS
from rayva.recipes import require_runnable, resolve
from rayva.steps import StepFolder
from rayva.storage import Storage

NAMES = [f"{n}.png" for n in range(40)]


def row(name, answer, sample_id=None):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": sample_id or name, "image": name, "conversations": turns}


@pytest.fixture
def recipe(tmp_path):
    """Two JSON files over one folder, one over another with the same names, and captions."""
    for folder in ("coco", "other", "mine"):
        (tmp_path / folder).mkdir()
        for name in NAMES:
            (tmp_path / folder / name).write_bytes(f"{name} of {folder}".encode())
            (tmp_path / folder / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    (tmp_path / "instruct.json").write_text(json.dumps([row(n, f"A {n}.") for n in NAMES]))
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps(row(n, "two")) for n in NAMES[:30]))
    (tmp_path / "sqa.json").write_text(json.dumps([row(n, "B") for n in NAMES] + [row("gone.png", "C")]))
    where = {name: str(tmp_path / name) for name in ("instruct.json", "short.jsonl", "sqa.json", "coco")}
    config = tmp_path / "mix.yaml"
    config.write_text(f"""
data:
  test_fraction: 0.3
  pretrain_json: {where["instruct.json"]}
  pretrain_images: {where["coco"]}
  finetune_mix:
    - {{path: {where["instruct.json"]}, images: {where["coco"]}}}
    - {{path: {where["short.jsonl"]}, images: {where["coco"]}, weight: 2}}
    - {{path: {where["sqa.json"]}, images: {tmp_path / "other"}, weight: 0.5, name: science}}
    - {{path: {tmp_path / "mine"}, format: captions}}
""")
    recipe = resolve("llava-7b", str(config))
    require_runnable(recipe)
    return recipe


def run_step(recipe, root):
    storage = Storage(str(root))
    folder = StepFolder(storage, "data", "0" * 64)
    context = SimpleNamespace(recipe=recipe, storage=storage, folder=folder, inputs={}, tracker=None)
    outputs = run(context).outputs
    kinds = {
        "images": ImageRecord,
        "pretrain": Sample,
        "finetune": Sample,
        "questions": Question,
        "quarantine": Rejected,
    }
    return outputs, {n: list(read_records(storage, folder.join(f"{n}.parquet"), k)) for n, k in kinds.items()}


def test_samples_lie_together_by_dataset_and_are_counted(recipe, tmp_path):
    outputs, tables = run_step(recipe, tmp_path / "out")
    order = list(dict.fromkeys(sample.dataset for sample in tables["finetune"]))
    assert order == ["instruct", "short", "science", "mine"]
    counts = Counter(sample.dataset for sample in tables["finetune"])
    assert [s.dataset for s in tables["finetune"]] == [name for name in order for _ in range(counts[name])]
    assert outputs["datasets"] == {
        "pretrain": {"instruct": len(tables["pretrain"])},
        "finetune": {name: counts[name] for name in order},
    }
    assert {sample.dataset for sample in tables["pretrain"]} == {"instruct"}
    assert outputs["quarantined"] == {"missing_image": 1}
    assert tables["quarantine"][0].source.endswith("sqa.json")


def test_ids_that_collide_stay_apart_and_shared_pictures_are_one(recipe, tmp_path):
    _, tables = run_step(recipe, tmp_path / "out")
    for name in ("pretrain", "finetune"):
        ids = [sample.sample_id for sample in tables[name]]
        assert len(set(ids)) == len(ids)
        assert all(i.startswith(f"{s.dataset}/") for i, s in zip(ids, tables[name], strict=True))
    questions = [question.question_id for question in tables["questions"]]
    assert len(set(questions)) == len(questions)
    images = {image.image_id: image for image in tables["images"]}
    assert len(images) == len(tables["images"])
    # One of each folder, and no fourth for the second file over the first folder.
    assert {i.split("://")[0] for i in images} == {"instruct", "science", "mine"}
    assert len({image.uri for image in tables["images"]}) == len(images)
    for sample in (*tables["pretrain"], *tables["finetune"]):
        folder = {"instruct": "coco", "short": "coco", "science": "other"}.get(sample.dataset, "mine")
        assert all(f"/{folder}/" in images[i].uri for i in sample.image_ids)


def test_held_out_pictures_are_trained_on_in_no_dataset(recipe, tmp_path):
    _, tables = run_step(recipe, tmp_path / "out")
    trained = {i.split("://")[1] for s in tables["finetune"] + tables["pretrain"] for i in s.image_ids}
    asked = {question.image_id.split("://")[1] for question in tables["questions"]}
    assert asked
    assert not trained & asked
    assert {q.question_id.split("/")[0] for q in tables["questions"]} == {
        "instruct",
        "short",
        "science",
        "mine",
    }
    assert {image.image_id for image in tables["images"]} >= {q.image_id for q in tables["questions"]}


def test_a_dataset_alone_has_the_samples_that_it_has_in_a_mix(recipe):
    mixed = [sample for sample in load_bundle(recipe.data).finetune if sample.dataset == "science"]
    one = recipe.data.finetune_mix[2]
    changes = {"finetune_mix": (), "finetune_json": one.path, "finetune_images": one.images}
    alone = list(load_bundle(recipe.data.model_copy(update=changes)).finetune)
    assert [sample.sample_id.removeprefix("science/") for sample in mixed] == [s.sample_id for s in alone]
    assert [sample.turns for sample in mixed] == [sample.turns for sample in alone]
    assert all(sample.dataset == "" for sample in alone)


def test_an_empty_dataset_is_named_with_the_reasons(recipe, tmp_path):
    (tmp_path / "sqa.json").write_text(json.dumps([row("gone.png", "C")]))
    with pytest.raises(DataError, match=r"'science' of data.finetune_mix .*1 missing_image"):
        run_step(recipe, tmp_path / "out")


def test_a_missing_file_is_named_by_its_place(recipe, tmp_path):
    (tmp_path / "short.jsonl").unlink()
    with pytest.raises(DataError, match=r"data.finetune_mix.1.path"):
        run_step(recipe, tmp_path / "out")
    with pytest.raises(DataError, match=r"data.finetune_mix.1.path"):
        fingerprint(recipe)


def test_changed_input_of_a_mix_is_noticed(recipe, tmp_path):
    before = fingerprint(recipe)
    (tmp_path / "sqa.json").write_text(json.dumps([row(n, "D") for n in NAMES]))
    (tmp_path / "mine" / "0.txt").write_text("another caption\n")
    after = fingerprint(recipe)
    assert {key for key in before if before[key] != after[key]} == {
        "data.finetune_mix.2.path",
        "data.finetune_mix.3.path",
    }


def test_a_weight_changes_the_stage_and_not_the_data(recipe):
    steps = {step.name: step for step in STEPS}
    changed = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(
                update={"finetune_mix": (recipe.data.finetune_mix[0], *(
                    one.model_copy(update={"weight": 3.0}) for one in recipe.data.finetune_mix[1:]
                ))}
            )
        }
    )  # fmt: skip
    same = {name for name in steps if steps[name].settings(recipe) == steps[name].settings(changed)}
    assert set(steps) - same == {"finetune"}


def test_what_was_finished_before_there_were_mixes_still_holds():
    steps = {step.name: step.settings(resolve("tiny")) for step in STEPS}
    for name in ("data", "pretrain", "finetune"):
        assert not any("mix" in key or "lengths" in key for key in steps[name])


def test_a_file_of_held_out_questions_keeps_its_pictures_out_of_every_dataset(recipe, tmp_path):
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([row("0.png", "two"), row("1.png", "A long answer that nobody can grade.")]))
    with_file = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(
                update={"held_out_json": str(asked), "held_out_images": str(tmp_path / "coco")}
            )
        }
    )
    _, tables = run_step(with_file, tmp_path / "out")
    assert [question.question_id for question in tables["questions"]] == ["0.png"]
    uris = {image.image_id: image.uri for image in tables["images"]}
    trained = {uris[i] for name in ("pretrain", "finetune") for s in tables[name] for i in s.image_ids}
    assert not trained & {str(tmp_path / "coco" / name) for name in ("0.png", "1.png")}
    # Pictures of other folders have the same names, and are others.
    assert {str(tmp_path / folder / "0.png") for folder in ("other", "mine")} <= trained
    assert {str(tmp_path / "coco" / name) for name in NAMES[2:]} <= trained
    (question,) = tables["questions"]
    assert uris[question.image_id] == str(tmp_path / "coco" / "0.png")

    mine = with_file.model_copy(
        update={"data": with_file.data.model_copy(update={"held_out_images": str(tmp_path / "mine")})}
    )
    _, tables = run_step(mine, tmp_path / "mine-out")
    uris = {image.image_id: image.uri for image in tables["images"]}
    of_captions = {uris[i] for s in tables["finetune"] if s.dataset == "mine" for i in s.image_ids}
    assert of_captions == {str(tmp_path / "mine" / name) for name in NAMES[2:]}
