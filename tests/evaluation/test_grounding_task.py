"""The task `grounding` of an evaluation: what it reads from a run or from LLaVA JSON, and how it decides."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from rayva.data.schema import ImageRecord, Question
from rayva.data.tables import write_records
from rayva.errors import DataError
from rayva.evaluation.tasks.base import Item, Result
from rayva.evaluation.tasks.grounding import Grounding, GroundingSettings
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage

COLOURS = ("red", "green", "blue", "black", "white")


def png(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(sink, "PNG")
    return sink.getvalue()


def make_run(root: Path) -> str:
    """A finished data step: two questions for each of five pictures, one without, one of another task."""
    storage = Storage(str(root))
    folder = StepFolder(storage, "data", step_digest("data", {}, {}))
    images = [ImageRecord(f"i{n}", "test", content=png(colour)) for n, colour in enumerate(COLOURS)]
    questions = [
        Question(f"q{n}{kind}", f"i{n}", "grounding", kind, text, (answer,), match)
        for n, colour in enumerate(COLOURS)
        for kind, text, answer, match in (
            ("short", "Colour?", colour, "text"),
            ("long", "What color is it?", f"All of it is {colour} as can be.", "color"),
        )
    ]
    questions.append(Question("gone", "no such image", "grounding", "short", "Colour?", ("red",)))
    questions.append(Question("text", "", "general", "capital", "Capital?", ("Paris",)))
    write_records(storage, folder.join("images.parquet"), ImageRecord, images)
    write_records(storage, folder.join("questions.parquet"), Question, questions)
    folder.finish({}, {}, 1.0)
    storage.write_json("summary.json", {"stages": {"data": {"digest": folder.digest}}})
    return str(root)


def make_json(root: Path) -> str:
    rows = []
    for n, colour in enumerate(COLOURS):
        (root / f"{n}.png").write_bytes(png(colour))
        first = {"from": "human", "value": "<image>\nWhat color is it?"}
        said = colour if n % 2 else f"The whole of it is {colour} in color."
        rows.append(
            {"id": str(n), "image": f"{n}.png", "conversations": [first, {"from": "gpt", "value": said}]}
        )
    free = [
        {"from": "human", "value": "<image>\nWhy?"},
        {"from": "gpt", "value": "For a lot of good reasons."},
    ]
    rows.append({"id": "free", "image": "0.png", "conversations": free})
    rows.append({**rows[0], "id": "gone", "image": "gone.png"})
    path = root / "data.json"
    path.write_text(json.dumps(rows))
    return str(path)


def answer_by_looking(items: list[Item], task: Grounding) -> Result:
    """A model that sees colours and else says red."""
    answers = {}
    for item in items:
        said = "red"
        if item.pictures:
            picture = item.pictures[0]
            content = picture.content or Path(str(picture.uri)).read_bytes()
            seen = Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0))
            said = next(c for c in COLOURS if Image.new("RGB", (1, 1), c).getpixel((0, 0)) == seen)
        answers[item.item_id] = f"It is {said}." if "color" in item.question else said.capitalize()
    return task.score(items, answers)


def test_a_run_is_asked_under_three_conditions(tmp_path: Path) -> None:
    task = Grounding(GroundingSettings(run=make_run(tmp_path)))
    items = task.read()
    assert len(items) == len({item.item_id for item in items}) == 30
    for item in items:
        condition = item.facts["condition"]
        assert len(item.pictures) == (condition != "no_image")
        assert sum(message.num_images for message in item.messages) == len(item.pictures)
        if condition == "right_image":
            assert item.pictures[0].name == item.facts["right_image"]
        if condition == "shuffled_images":
            assert item.pictures[0].name != item.facts["right_image"]
    result = answer_by_looking(items, task)
    figures = result.figures
    assert (figures["accuracy"], figures["questions"], figures["missing"]) == (1.0, 10, 0)
    assert (figures["accuracy_shuffled_images"], figures["accuracy_no_image"]) == (0.0, 0.2)
    assert figures["passed"] is True
    assert figures["left_out"] == {"image_quarantined": 1}
    assert set(figures["by_kind"]) == {"short", "long"}
    assert len(result.rows) == 10
    parts = {"accuracy", "accuracy_shuffled_images", "accuracy_no_image"}
    assert all(row.parts.keys() == parts and row.picture for row in result.rows)


def test_llava_json_is_asked_where_it_can_be_graded(tmp_path: Path) -> None:
    task = Grounding(GroundingSettings(data=make_json(tmp_path)))
    items = task.read()
    assert {item.question_id for item in items} == {"0", "1", "2", "3", "4"}
    assert {item.facts["match"] for item in items} == {"text", "color"}
    figures = task.score(items, {}).figures
    assert (figures["questions"], figures["missing"], figures["passed"]) == (0, 15, False)
    assert figures["left_out"] == {"image_quarantined": 1}
    right = {item.item_id: f"Oh, it is {COLOURS[int(item.question_id)]}" for item in items}
    # Sentences do where the reference is one, and not where it is a word.
    assert task.score(items, right).figures["by_kind"]["color"]["right_image"] == 1.0
    assert task.score(items, right).figures["by_kind"]["other"]["right_image"] == 0.0


def test_a_model_that_does_not_look_is_not_passed(tmp_path: Path) -> None:
    task = Grounding(GroundingSettings(run=make_run(tmp_path), min_accuracy=0.1))
    items = task.read()
    figures = task.score(items, {item.item_id: "red" for item in items}).figures
    assert figures["accuracy"] == figures["accuracy_shuffled_images"] == figures["accuracy_no_image"] == 0.2
    assert figures["passed"] is False
    assert "without image" in figures["why"] or "another question's image" in figures["why"]


def test_a_number_of_questions_is_drawn_with_the_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    drawn = [
        {
            item.question_id
            for item in Grounding(GroundingSettings(run=run, max_questions=4, seed=seed)).read()
        }
        for seed in (1, 1, 2)
    ]
    assert [len(questions) for questions in drawn] == [4, 4, 4]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no questions"):
        Grounding(GroundingSettings()).read()
    with pytest.raises(DataError, match="no run"):
        Grounding(GroundingSettings(run=str(tmp_path))).read()
    with pytest.raises(DataError, match="can be graded"):
        Grounding(GroundingSettings(data=make_json(tmp_path), images=str(tmp_path / "images"))).read()
