"""Evaluations on the storage: how they are written, and how they and the gate's step are read again.

evaluation.json     model, tasks, settings
TASK/scores.json    figures
TASK/rows.jsonl     one question a line, with the parts of its figures
TASK/answers.jsonl  every answer with its prompt, as LLaVA's scripts write them
TASK/pictures/      pictures that are in no file of their own
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from rayva.data.locations import join
from rayva.errors import DataError
from rayva.evaluation.comparison import RunRecord, TaskRecord
from rayva.evaluation.grounding import GATE_TASK
from rayva.evaluation.metrics import ANSWERS
from rayva.evaluation.reading import as_object, read_rows
from rayva.evaluation.tasks.base import Result
from rayva.evaluation.tasks.grounding import run_step
from rayva.steps import SUMMARY, read_summary
from rayva.storage import Storage

EVALUATION = "evaluation.json"
_REMEDY = "it is damaged: run pipelines/evaluate.py again, with an --out of its own"
_FIELDS = ("question", "answer", "reference", "picture", "note")
_CONDITIONS = {
    "right_image": "accuracy",
    "shuffled_images": "accuracy_shuffled_images",
    "no_image": "accuracy_no_image",
}


def write_result(storage: Storage, task: str, result: Result, places: Mapping[str, str]) -> None:
    """Writes a task's figures and rows; `places` has each picture's path or URI by its name."""
    rows = [row.row() | {"picture": places.get(row.picture or "")} for row in result.rows]
    storage.write_bytes(f"{task}/rows.jsonl", lines(rows))
    storage.write_json(f"{task}/scores.json", result.figures)


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def read_run(reference: str, name: str | None = None) -> RunRecord:
    """An evaluation's folder, or the storage root of a run of full.py with its step `evaluate`.

    Raises:
        DataError: there is neither.
    """
    storage = Storage(reference)
    name = name or storage.root.rstrip("/").rpartition("/")[2]
    if storage.exists(EVALUATION):
        return _evaluation(storage, name)
    if storage.exists(SUMMARY):
        return _gate_step(storage, name)
    raise DataError(
        f"{reference} holds neither {EVALUATION} (an evaluation) nor {SUMMARY} (a run)",
        "give the --out of pipelines/evaluate.py, or the --storage of pipelines/full.py",
    )


def _evaluation(storage: Storage, name: str) -> RunRecord:
    about = as_object(storage.read_json(EVALUATION), storage.uri(EVALUATION))
    tasks = {}
    for task in as_object(about.get("tasks"), f"{storage.uri(EVALUATION)}, `tasks`"):
        if not storage.exists(f"{task}/scores.json"):
            continue
        path = storage.uri(f"{task}/rows.jsonl")
        rows = [
            _checked(row, f"{path}, row {number}")
            for number, row in enumerate(_rows(storage, f"{task}/rows.jsonl"), 1)
        ]
        scores = as_object(storage.read_json(f"{task}/scores.json"), storage.uri(f"{task}/scores.json"))
        tasks[task] = TaskRecord(scores, {str(row["question_id"]): row for row in rows})
    if not tasks:
        raise DataError(
            f"the evaluation in {storage.root} is not finished", "run pipelines/evaluate.py again"
        )
    return RunRecord(name, storage.root, {"model": about.get("model")}, tasks)


def _rows(storage: Storage, rel: str) -> list[Any]:
    if not storage.read_bytes(rel).strip():
        return []  # nothing could be asked
    return read_rows(storage.uri(rel), rel)


def _checked(value: Any, where: str) -> dict[str, Any]:
    """A row as `write_result` writes it; else `DataError`."""
    row = as_object(value, where)
    missing = [name for name in ("question_id", "parts", *_FIELDS) if name not in row]
    if missing:
        raise DataError(f"{where}: there is no `{missing[0]}`", _REMEDY)
    parts = as_object(row["parts"], f"{where}, `parts`")
    pairs = [pair for listed in parts.values() for pair in (listed if isinstance(listed, list) else [None])]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs):
        raise DataError(f"{where}: `parts` are no pairs of numbers", _REMEDY)
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _gate_step(storage: Storage, name: str) -> RunRecord:
    """The step `evaluate` of a run: its questions under each condition, by task."""
    folder = run_step(storage, "evaluate")
    with storage.open(folder.join("answers.parquet")) as file:
        rows = pq.read_table(file, columns=ANSWERS.names).to_pylist()
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found = tasks.setdefault(row["task"], {}).setdefault(
            row["question_id"],
            {"question_id": row["question_id"], "group": row["kind"], "question": row["prompt"], "answer": "",
             "reference": " / ".join(row["accepted"][:3]), "picture": None, "note": "", "parts": {}},
        )  # fmt: skip
        main = row["condition"] == "right_image" or row["task"] != GATE_TASK
        if main:
            found["answer"] = row["answer"]
            found["picture"] = row["image_id"] and f"image:{row['image_id']}"
        figure = (
            "accuracy" if row["task"] != GATE_TASK and not row["image_id"] else _CONDITIONS[row["condition"]]
        )
        found["parts"][figure] = [[float(row["correct"]), 1.0]]
    outputs = folder.outputs
    return RunRecord(
        name,
        storage.root,
        {"model": read_summary(storage).get("assistant"), "passed": outputs.get("passed")},
        {task: TaskRecord(outputs.get(task, {}), found) for task, found in sorted(tasks.items())},
    )


def picture_bytes(run: RunRecord, pictures: Sequence[str]) -> dict[str, bytes | str]:
    """Bytes of pictures that a run names, or the path or URI where they are."""
    inside = {name.removeprefix("image:") for name in pictures if name.startswith("image:")}
    found: dict[str, bytes | str] = {}
    if inside:
        storage = Storage(run.folder)
        with storage.open(run_step(storage, "data").join("images.parquet")) as file:
            columns = ["image_id", "uri", "content"]
            rows = pq.read_table(file, columns=columns, filters=[("image_id", "in", inside)]).to_pylist()
        found = {f"image:{row['image_id']}": row["content"] or row["uri"] for row in rows}
    for name in pictures:
        if not name.startswith("image:"):
            found[name] = join(run.folder, name)
    return found
