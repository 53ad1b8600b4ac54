"""An evaluation of a model folder on Ray Data: batches answer as one question alone does; kill -9; a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rayva.evaluation.answers import Asked, Sampled, asked
from rayva.evaluation.tasks.base import Item
from rayva.evaluation.tasks.registry import make_tasks
from rayva.model.folder import Assistant, load_assistant
from rayva.orchestration.answering import Answerer, question_rows
from rayva.storage import Storage
from rayva.text.conversation import Message
from rayva.vision.decode import decode_image
from tests.evaluation.bench_data import make_pope, make_scienceqa, make_vqa
from tests.export.tiny_model import make_model_folder
from tests.reference import ROOT

SCRIPT = [sys.executable, str(ROOT / "pipelines" / "evaluate.py")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_scienceqa(root / "sqa", 9)
    make_pope(root / "pope", 60)
    make_vqa(root / "vqa")
    return root


def settings(data: Path) -> list[str]:
    return [
        f"scienceqa.folder={data / 'sqa'}",
        f"pope.folder={data / 'pope'}",
        f"vqa.data={data / 'vqa/vqa.jsonl'}",
    ]


def questions(data: Path, limit: int = 12) -> list[Asked]:
    """Questions of three tasks, with and without pictures, short and long, some with a history."""
    tasks = make_tasks(["scienceqa", "pope", "vqa"], settings(data))
    return [
        asked(task.name, item, Sampled(limit), {"model": "tiny"}) for task in tasks for item in task.read()
    ]


def one_at_a_time(assistant: Assistant, item: Item, limit: int) -> str:
    """The simplest way to ask: one question, its pictures, `generate`."""
    pictures = [decode_image(Path(str(picture.uri)).read_bytes()) for picture in item.pictures]
    features = [assistant.encode_images([picture])[0] for picture in pictures]
    return assistant.answer_batch([list(item.messages)], [features], limit)[0]


def test_batches_give_the_very_answers_of_one_question_at_a_time(folder: Path, data: Path) -> None:
    assistant = load_assistant(folder)
    given = list({one.key: one for one in questions(data)}.values())
    answerer = Answerer(assistant)
    together = {
        answer.key: answer.text for rows in question_rows(given, 7) for answer in answerer.answer(rows)
    }
    alone = {one.key: one_at_a_time(assistant, one.item, 12) for one in given}
    assert together == alone
    assert len(set(alone.values())) > 5  # a model that always says the same proves nothing


def test_a_picture_that_cannot_be_shown_leaves_out_its_questions_alone(folder: Path, data: Path) -> None:
    given = questions(data)[:9]
    rows = [row for batch in question_rows(given, 9) for row in batch]
    with_picture = [row for row in rows if row["pictures"]]
    with_picture[0]["pictures"][0]["uri"] = str(data / "gone.png")
    with_picture[1]["pictures"][0].update(uri=None, content=b"no picture")
    answered = {answer.key: answer for answer in Answerer(load_assistant(folder)).answer(rows)}
    errors = {key: answer.error for key, answer in answered.items() if answer.error}
    assert set(errors) == {row["key"] for row in with_picture[:2]}
    assert "missing" in errors[with_picture[0]["key"]]


def test_a_question_that_does_not_fit_the_context_is_told(folder: Path, data: Path) -> None:
    (first, second) = questions(data)[9:11]
    long = Item("long", "long", (Message("user", ("why? " * 600,)),))
    rows = next(question_rows([first, asked("vqa", long, Sampled(12), {}), second], 3))
    answered = {answer.item_id: answer for answer in Answerer(load_assistant(folder)).answer(rows)}
    assert "the model's context is 512" in answered["long"].error
    assert not answered[first.item.item_id].error


def test_the_two_step_prompt_goes_on_from_what_was_said(folder: Path, data: Path) -> None:
    tasks = make_tasks(["scienceqa"], [f"scienceqa.folder={data / 'sqa'}", "scienceqa.format=QCM-LEPA"])
    given = [asked("scienceqa", item, Sampled(6), {}) for item in tasks[0].read()]
    assistant = load_assistant(folder)
    rows = [row for batch in question_rows(given, 4) for row in batch]
    answered = {answer.key: answer.text for answer in Answerer(assistant).answer(rows)}
    for one in given[:3]:
        first = one_at_a_time(assistant, one.item, 6)
        assert answered[one.key].startswith(f"{first.rstrip()}\n###\nANSWER: ")
        begun = f"{first.rstrip()}\n###\nANSWER:"
        batch = assistant._batch([list(one.item.messages)], [_features(assistant, one.item)], [begun])
        text = assistant.tokenizer.decode([i for i in batch.input_ids_BT[0].tolist() if i >= 0])
        assert text.rstrip().endswith("###\nANSWER:")


def _features(assistant: Assistant, item: Item) -> list[Any]:
    return [assistant.encode_images([decode_image(Path(str(p.uri)).read_bytes())])[0] for p in item.pictures]


def command(folder: Path, data: Path, out: Path, *more: object) -> list[str]:
    return [
        *SCRIPT, "--model", str(folder), "--tasks", "scienceqa", "pope", "vqa", "--out", str(out),
        "--max-new-tokens", "12", "--batch-size", "4", *map(str, more), *settings(data),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(arguments: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parts(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / "parts").glob("[!.]*.json")}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.thorough
def test_killed_and_started_again_it_asks_only_what_was_not_answered(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(folder, data, out, "--replicas", 1, "--tracking-uri", "none")
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    end = time.monotonic() + 240
    while len(parts(out)) < 4:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = parts(out)
    found = run(arguments)
    after = parts(out)
    assert kept.items() <= after.items()
    keys = Counter(row["key"] for text in after.values() for row in json.loads(text))
    wanted = {one.key for one in questions(data)}
    assert len(keys) == len(wanted)
    # A batch that was under way when the job was killed may be written by its replica, and asked again.
    assert sum(count - 1 for count in keys.values()) <= 4
    assert found["pope"]["count"] == 120
    assert found["scienceqa"]["answered"] == 9
    # The answers are those of one question at a time.
    assistant = load_assistant(folder)
    rows = [json.loads(line) for line in (out / "vqa" / "answers.jsonl").read_text().splitlines()]
    texts = {row["question_id"]: row["text"] for row in rows}
    for one in questions(data):
        if one.task == "vqa":
            assert texts[one.item.item_id] == one_at_a_time(assistant, one.item, 12)
    # Two replicas give the same, and MLflow has it.
    two = tmp_path / "two"
    second = run(command(folder, data, two, "--replicas", 2))
    assert found == second
    for task in ("scienceqa", "pope", "vqa"):
        assert (out / task / "answers.jsonl").read_text() == (two / task / "answers.jsonl").read_text()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{two / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rayva-evaluate")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["pope/accuracy"] == second["pope"]["accuracy"]
    assert logged.data.params["model"] == str(folder)
    names = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert {"report.html", "metrics.json"} <= names
    assert Storage(str(two)).read_json("evaluation.json")["identity"]["precision"] == "auto"
