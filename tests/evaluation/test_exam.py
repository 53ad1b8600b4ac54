"""An evaluation in this process, of a real HTTP endpoint: where pictures are, and what cannot be asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rayva.evaluation.chat import ChatModel, endpoint
from rayva.evaluation.records import picture_bytes, read_run
from rayva.evaluation.tasks.registry import make_tasks
from rayva.orchestration.exam import Exam, run_exam
from rayva.storage import Storage
from tests.evaluation.bench_data import make_llava_bench, make_pope, make_vqa
from tests.evaluation.chat_server import ChatServer


def chat_model(server: ChatServer, concurrency: int = 2) -> ChatModel:
    return ChatModel("m", endpoint(server.url, "NO_SUCH_KEY", concurrency, first_delay=0.001))


def exam(server: ChatServer, tasks: list[str], settings: list[str], **fields: Any) -> Exam:
    return Exam(make_tasks(tasks, settings), None, chat_model(server), **fields)


def test_data_named_by_relative_paths_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pope(tmp_path / "pope", 2)
    make_llava_bench(tmp_path / "bench", 2)
    data = make_vqa(tmp_path / "vqa").rename(tmp_path / "vqa.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = ["pope.folder=pope", "llava_bench.folder=bench", f"vqa.data={data}", "vqa.images=./vqa"]
    with ChatServer(lambda *_: "Yes.") as server:
        run_exam(exam(server, ["pope", "llava_bench", "vqa"], settings), Storage("out"))
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    run = read_run(str(tmp_path / "out"))
    names = {row["picture"] for task in run.tasks.values() for row in task.rows.values()}
    places = picture_bytes(run, sorted(names)).values()
    assert len(places) == 2 + 2 + 3
    assert all(Path(str(place)).is_file() for place in places)
