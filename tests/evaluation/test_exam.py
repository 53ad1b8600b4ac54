"""An evaluation in this process, of a real HTTP endpoint: where pictures are, and what cannot be asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import ServingError
from rayva.evaluation.chat import ChatModel, endpoint
from rayva.evaluation.judge import Judge
from rayva.evaluation.records import picture_bytes, read_run
from rayva.evaluation.tasks.registry import make_tasks
from rayva.orchestration.exam import Exam, run_exam
from rayva.storage import Storage
from tests.evaluation.bench_data import make_llava_bench, make_pope, make_vqa
from tests.evaluation.chat_server import ChatServer, question_of
from tests.reference import ROOT


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


def failing_at(*questions: str) -> Any:
    """Answers all but some questions, at which it always fails."""

    def answer(_: int, body: dict[str, Any]) -> Any:
        asked = question_of(body)
        return (500, {}, "oops") if any(text in asked for text in questions) else "Yes."

    return answer


def test_a_question_that_always_fails_is_counted_and_asked_again_by_a_later_start(tmp_path: Path) -> None:
    settings = [f"pope.folder={make_pope(tmp_path / 'pope', 6)}"]
    out = Storage(str(tmp_path / "out"))
    broken = ["cup 0?"]
    with ChatServer(lambda number, body: failing_at(*broken)(number, body)) as server:
        found = run_exam(exam(server, ["pope"], settings), out)["pope"]
        assert (found["could_not_be_asked"], found["count"], found["tp"], found["fp"]) == (2, 10, 4, 6)
        calls = len(server.calls)
        assert calls == 5 + 6
        run_exam(exam(server, ["pope"], settings), out)
        assert len(server.calls) == calls + 6
        assert (tmp_path / "out" / "report.html").exists()
        broken.clear()
        found = run_exam(exam(server, ["pope"], settings), out)["pope"]
        assert (found["could_not_be_asked"], found["count"]) == (0, 12)
        assert len(server.calls) == calls + 6 + 1


def test_many_questions_that_always_fail_do_not_block_a_later_start(tmp_path: Path) -> None:
    settings = [f"pope.folder={make_pope(tmp_path / 'pope', 60)}", f"vqa.data={make_vqa(tmp_path / 'vqa')}"]
    out = Storage(str(tmp_path / "out"))
    # Every second one, so that the first start meets no long row of them: a later start meets nothing else.
    with ChatServer(failing_at(*(f" {n}?" for n in range(0, 60, 2)))) as server:
        found = run_exam(exam(server, ["pope"], settings[:1]), out)["pope"]
        assert found["could_not_be_asked"] == 60
        found = run_exam(exam(server, ["pope", "vqa"], settings), out)
    assert (found["pope"]["could_not_be_asked"], found["vqa"]["count"]) == (60, 6)


def test_a_judge_that_always_fails_at_one_question_leaves_it_out(tmp_path: Path) -> None:
    settings = [f"llava_bench.folder={make_llava_bench(tmp_path / 'bench')}"]
    out = Storage(str(tmp_path / "out"))
    broken = ["picture 1?"]
    runs = 15  # more of them than may fail in a row

    def grade(number: int, body: dict[str, Any]) -> Any:
        answer = failing_at(*broken)(number, body)
        return "8 6" if answer == "Yes." else answer

    with ChatServer(lambda *_: "A cup.") as server, ChatServer(grade) as other:
        judged = exam(server, ["llava_bench"], settings, judge=Judge(chat_model(other), runs=runs))
        found = run_exam(judged, out)["llava_bench"]
        assert (found["relative_score"], found["parse_failures"]) == (75.0, runs)
        assert found["judge_could_not_be_asked"] == runs
        assert run_exam(judged, out)["llava_bench"] == found
        broken.clear()
        calls = len(other.calls)
        found = run_exam(judged, out)["llava_bench"]
        assert (found["parse_failures"], found["judge_could_not_be_asked"]) == (0, 0)
        assert len(other.calls) == calls + runs


def test_an_endpoint_that_fails_at_everything_is_given_up(tmp_path: Path) -> None:
    settings = [f"pope.folder={make_pope(tmp_path / 'pope', 40)}"]
    with ChatServer(failing_at("Is there")) as server, pytest.raises(ServingError, match="oops"):
        run_exam(exam(server, ["pope"], settings), Storage(str(tmp_path / "out")))
    assert len(server.calls) < 6 * 20
    with pytest.raises(ServingError, match="does not answer"):  # nobody is there: told at the first question
        run_exam(exam(server, ["pope"], settings), Storage(str(tmp_path / "out")))


def test_what_a_killed_process_was_writing_is_no_answer(tmp_path: Path) -> None:
    settings = [f"pope.folder={make_pope(tmp_path / 'pope', 4)}"]
    killed = (
        "import os, signal, sys; from rayva.storage import Storage\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Storage(sys.argv[1]).write_bytes('parts/' + 'a' * 32 + '.json', b'[{')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "out")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 1
    with ChatServer(lambda *_: "Yes.") as server:
        found = run_exam(exam(server, ["pope"], settings), Storage(str(tmp_path / "out")))
    assert found["pope"]["count"] == 8
