"""rayva compare on evaluations as they are written, on a run's own step, in HTML and in MLflow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayva.data.schema import ImageRecord
from rayva.data.tables import write_records
from rayva.evaluation.comparison import as_json, compare
from rayva.evaluation.metrics import ANSWERS
from rayva.evaluation.records import EVALUATION, read_run, write_result
from rayva.evaluation.tasks.base import Result, Scored
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from tests.evaluation.released import figures, rayva

COUNT = 60


def png(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(sink, "PNG")
    return sink.getvalue()


def evaluation(folder: Path, right: int, points: float = 6.0, questions: int = COUNT) -> Path:
    """An evaluation that is right at the first `right` questions; and a judge's."""
    storage = Storage(str(folder))
    storage.write_bytes("vqa/pictures/p", png("red"))
    rows = [
        Scored(f"q{n}", f"Question <b>{n}</b>?", f"answer of {folder.name}", "red",
               {"accuracy": [(float(n < right), 1.0)]}, group=("a", "b")[n % 2], picture="p.png")
        for n in range(questions)
    ]  # fmt: skip
    write_result(storage, "vqa", Result({"task": "vqa", "missing": 3}, rows), {"p.png": "vqa/pictures/p"})
    reviewed = [
        Scored(str(n), f"Describe {n}", "A cup.", "Two cups.",
               {"relative_score": [(points, 8.0), (points + n % 2, 8.0)]}) for n in range(20)
    ]  # fmt: skip
    write_result(storage, "llava_bench", Result({"task": "llava_bench"}, reviewed), {})
    storage.write_json(EVALUATION, {"model": f"model {folder.name}", "tasks": {"vqa": {}, "llava_bench": {}}})
    return folder


def gate_run(root: Path) -> Path:
    """A run of full.py whose evaluate step is finished."""
    storage = Storage(str(root))
    stages = {}
    for name in ("data", "evaluate"):
        folder = StepFolder(storage, name, step_digest(name, {}, {}))
        if name == "data":
            images = [ImageRecord(f"i{n}", "test", content=png("blue")) for n in range(10)]
            write_records(storage, folder.join("images.parquet"), ImageRecord, images)
            folder.finish({}, {}, 1)
        else:
            rows = [
                {"question_id": f"q{n}", "task": "grounding", "kind": "colour", "condition": condition,
                 "image_id": f"i{n}", "prompt": "Colour?", "answer": "red", "accepted": ["red"],
                 "correct": condition == "right_image" and n < 7}
                for n in range(10) for condition in ("right_image", "shuffled_images")
            ]  # fmt: skip
            rows.append({**rows[0], "question_id": "t", "task": "text", "condition": "no_image",
                         "image_id": None, "correct": True})  # fmt: skip
            storage.makedirs(folder.rel)
            pq.write_table(pa.Table.from_pylist(rows, ANSWERS), storage.path(folder.join("answers.parquet")))
            folder.finish({"grounding": {"why": "It looks."}, "passed": True}, {}, 1)
        stages[name] = {"digest": folder.digest}
    storage.write_json("summary.json", {"stages": stages, "assistant": "model"})
    return root


def figure(found: dict[str, Any], task: str, name: str, group: str = "all") -> dict[str, Any]:
    (row,) = (f for f in found["figures"] if (f["task"], f["figure"], f["group"]) == (task, name, group))
    return dict(row)


def test_figures_differences_and_examples(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / "a", 30), evaluation(tmp_path / "b", 45, points=7)]
    found = figures("compare", *runs, "--json", "--examples", 6)
    accuracy = figure(found, "vqa", "accuracy")
    assert [value["value"] for value in accuracy["values"]] == [50.0, 75.0]
    assert accuracy["questions"] == COUNT
    difference = accuracy["differences"][1]
    assert difference["value"] == 25.0
    assert 10 < difference["low"] < 25 < difference["high"] < 40
    assert figure(found, "vqa", "accuracy", "a")["questions"] == COUNT // 2
    judged = figure(found, "llava_bench", "relative_score")
    assert judged["values"][0]["value"] == pytest.approx(100 * (6 / 8 + 6.5 / 8) / 2, abs=1e-3)
    assert judged["differences"][1] == {"value": 12.5, "low": 12.5, "high": 12.5}
    differ = [row for row in found["differ"] if row["task"] == "vqa"]
    assert len(differ) == 6
    assert all(row["points"] == [0.0, 1.0] for row in differ)
    assert found == figures("compare", *runs, "--json", "--examples", 6)  # the seed fixes it
    table = rayva("compare", *runs)
    assert "+25.00 [" in table.stdout
    assert "b - a" in table.stdout


def test_the_report_shows_pictures_and_escapes_text(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / "a", 30), evaluation(tmp_path / "b", 45)]
    done = rayva("compare", *runs, "--html", tmp_path / "sub" / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "sub" / "report.html").read_text()
    assert "data:image/webp" in page
    assert "Question &lt;b&gt;" in page
    assert "<b>" not in page.partition("<main>")[2]
    assert "answer of a" in page
    assert "answer of b" in page
    assert "3 questions without an answer" in page
    assert "http://" not in page.partition("</style>")[2]


def test_only_shared_questions_count(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / "a", 30), evaluation(tmp_path / "b", 30, questions=40)]
    found = as_json(compare([read_run(str(run)) for run in runs], resamples=50))
    accuracy = figure(found, "vqa", "accuracy")
    assert accuracy["questions"] == 40
    assert accuracy["differences"][1] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_run_of_the_whole_job(tmp_path: Path) -> None:
    run = gate_run(tmp_path / "run")
    done = rayva("compare", f"first={run}", f"second={run}", "--html", tmp_path / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["name"] for run in found["runs"]] == ["first", "second"]
    assert figure(found, "grounding", "accuracy")["values"][0]["value"] == 70.0
    assert figure(found, "grounding", "accuracy_shuffled_images")["values"][0]["value"] == 0.0
    assert figure(found, "text", "accuracy")["values"][0]["value"] == 100.0
    single = rayva("compare", run, "--html", tmp_path / "one.html")
    assert single.returncode == 0
    assert (tmp_path / "one.html").read_text().count("data:image/webp") == 10


@pytest.mark.slow
def test_the_comparison_goes_into_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    runs = [evaluation(tmp_path / "a", 30), evaluation(tmp_path / "b", 45)]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):  # the same comparison goes on in the same run
        done = rayva("compare", *runs, f"llava+v1 (7b)={runs[0]}", f"..={runs[1]}", "--tracking-uri", uri)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rayva-compare")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["a/vqa/accuracy"] == 50.0
    assert logged.data.metrics["b - a/vqa/accuracy"] == 25.0
    assert logged.data.metrics["b - a/vqa/accuracy/low"] > 5
    assert logged.data.metrics["llava_v1 _7b_/vqa/accuracy"] == 50.0
    assert logged.data.metrics["_/vqa/accuracy"] == 75.0
    assert logged.data.params["run.llava_v1 _7b_"] == str(runs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "holds neither"),
        (["a", "a"], "two runs are called 'a'"),
        (["a", "--level", "2"], "--level"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: list[str], message: str) -> None:
    evaluation(tmp_path / "a", 30)
    done = rayva("compare", *(tmp_path / a if a in ("a", "nothing") else a for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("vqa/rows.jsonl", '"parts"', '"party"', "rows.jsonl, row 1: there is no `parts`"),
        ("vqa/rows.jsonl", "[[1.0, 1.0]]", "[[1.0]]", "rows.jsonl, row 1: `parts` are no pairs of numbers"),
        ("vqa/rows.jsonl", "}\n", "}\n7\n", "rows.jsonl, row 2: expected an object"),
        ("vqa/scores.json", "{", "[{", "scores.json"),
        (EVALUATION, '"tasks"', '"task"', "evaluation.json, `tasks`: expected an object"),
        (EVALUATION, '"tasks"', "", "evaluation.json"),
    ],
)
def test_a_damaged_evaluation_is_told(tmp_path: Path, file: str, old: str, new: str, told: str) -> None:
    path = evaluation(tmp_path / "a", 30) / file
    path.write_text(path.read_text().replace(old, new, 1))
    done = rayva("compare", tmp_path / "a")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
