"""An evaluation against a real HTTP endpoint, with a judge: records, misbehaviour, kill -9, other models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayva.evaluation.reviews import read_reviews, score_reviews
from rayva.evaluation.tasks.registry import make_tasks
from tests.evaluation.bench_data import make_llava_bench, make_pope, make_scienceqa, make_vqa
from tests.evaluation.chat_server import ChatServer, question_of
from tests.evaluation.released import figures
from tests.reference import ROOT

pytestmark = pytest.mark.slow
SCRIPT = [sys.executable, str(ROOT / "pipelines" / "evaluate.py")]
SECRET = "sk-very-secret"


def environment() -> dict[str, str]:
    return {**os.environ, "OPENAI_API_KEY": SECRET, "OMP_NUM_THREADS": "1"}


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*SCRIPT, *map(str, arguments), "--tracking-uri", "none"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )


def answers(out: Path, task: str) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / task / "answers.jsonl").read_text().splitlines()]
    return {row["question_id"]: row for row in rows}


def test_all_tasks_in_one_run_with_every_prompt_kept(tmp_path: Path) -> None:
    folders = {
        "scienceqa": make_scienceqa(tmp_path / "sqa"),
        "pope": make_pope(tmp_path / "pope"),
        "llava_bench": make_llava_bench(tmp_path / "bench"),
    }
    vqa = make_vqa(tmp_path / "vqa")
    settings = [f"{task}.folder={folder}" for task, folder in folders.items()]

    def answer(_: int, body: dict[str, Any]) -> str:
        text = question_of(body)
        return "The answer is A." if "Options:" in text else "Yes, red." if "cup" in text else "Red."

    out = tmp_path / "out"
    with ChatServer(answer) as server:
        done = evaluate(
            "--endpoint", server.url, "--endpoint-model", "m", "--tasks", "scienceqa", "pope,llava-bench",
            "vqa", "--out", out, *settings, f"vqa.data={vqa}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        asked = len(server.calls)
    found = json.loads(done.stdout)
    assert asked == 6 + 8 + 6 + 6  # both categories of POPE ask the same questions: once is enough
    assert found["scienceqa"]["from_outputs"]["correct"] == 2
    assert found["pope"]["recall"] == 100.0
    assert found["vqa"]["by_kind"]["other"]["correct"] == 1
    assert found["vqa"]["rows_left_out"] == {"no_conversations": 1}
    assert found["llava_bench"]["relative_score"] is None
    row = answers(out, "vqa")["v1/2"]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]
    assert row["messages"][1]["content"] == "green"
    assert row["prompt"] == "How many?"
    shown = next(call for call in server.calls if "number 0?" in question_of(call))
    assert shown["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert shown["temperature"] == 0
    assert set(server.keys) == {f"Bearer {SECRET}"}
    kept = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in kept)
    report = (out / "report.html").read_text()
    assert "ScienceQA" in report
    assert report.count("data:image/webp") >= 4
    # The command on the answers' files gives the same figures.
    again = figures(
        "score", "scienceqa", "--problems", folders["scienceqa"] / "problems.json", "--splits",
        folders["scienceqa"] / "pid_splits.json", "--predictions", out / "scienceqa" / "answers.jsonl",
    )  # fmt: skip
    assert again["from_outputs"] == found["scienceqa"]["from_outputs"]
    labels = sorted(folders["pope"].glob("coco_pope_*.json"))
    pope = figures("score", "pope", "--labels", *labels, "--predictions", out / "pope" / "answers.jsonl")
    assert pope["f1"] == found["pope"]["f1"]


def test_a_misbehaving_endpoint_is_asked_again_and_a_refused_question_is_left_out(tmp_path: Path) -> None:
    data = make_pope(tmp_path / "pope", 4)
    troubles: list[Any] = [
        (429, {"Retry-After": "0"}, "{}"), (500, {}, "oops"), b'{"choices": [{"mess', (200, {}, "not json"),
        (200, {}, '{"choices": []}'),
    ]  # fmt: skip

    def answer(number: int, body: dict[str, Any]) -> Any:
        if question_of(body).startswith("Is there a cup or so or so or so 3?"):
            return (400, {}, '{"error": {"message": "too long"}}')
        return troubles[number - 1] if number <= len(troubles) else "No."

    out = tmp_path / "out"
    command = ["--endpoint-model", "m", "--tasks", "pope", "--out", out, f"pope.folder={data}"]
    with ChatServer(answer) as server:
        done = evaluate("--endpoint", server.url, "--concurrency", 2, *command)
        assert done.returncode == 0, done.stderr
        assert len(server.calls) == 4 + len(troubles)
        found = json.loads(done.stdout)["pope"]
        assert found["could_not_be_asked"] == 2
        assert (found["tn"], found["fn"], found["missing"]) == (2, 4, 0)
        assert "too long" in done.stderr
        # Only what was refused is asked again.
        evaluate("--endpoint", server.url, *command)
        assert len(server.calls) == 4 + len(troubles) + 1
        other = evaluate("--endpoint", server.url, *command[2:], "--endpoint-model", "another")
        assert other.returncode == 2
        assert "another model" in other.stderr
    with ChatServer(lambda *_: (401, {}, '{"error": {"message": "bad key"}}')) as refusing:
        done = evaluate(
            "--endpoint", refusing.url, "--endpoint-model", "m", "--tasks", "pope",
            "--out", tmp_path / "other", f"pope.folder={data}",
        )  # fmt: skip
        assert done.returncode == 2
        assert "bad key" in done.stderr
        assert SECRET not in done.stderr


def test_killed_and_started_again_no_answered_question_is_asked_twice(tmp_path: Path) -> None:
    data = make_pope(tmp_path / "pope", 80)
    out = tmp_path / "out"
    concurrency = 4
    with ChatServer(lambda *_: "Yes.", delay=0.05) as server:
        command = [
            *SCRIPT, "--endpoint", server.url, "--endpoint-model", "m", "--tasks", "pope", "--out", str(out),
            f"pope.folder={data}", "--concurrency", str(concurrency), "--tracking-uri", "none",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        while len(server.calls) < 25:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path.name: path.read_text() for path in (out / "parts").glob("*.json")}
        assert kept
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
        assert done.returncode == 0, done.stderr
        assert len(server.calls) <= 80 + concurrency
        asked = Counter((question_of(call), call["messages"][0]["content"][0]["image_url"]["url"])
                        for call in server.calls)  # fmt: skip
        assert sum(asked.values()) - 80 <= concurrency
    assert json.loads(done.stdout)["pope"]["count"] == 160
    assert len(answers(out, "pope")) == 160
    assert all((out / "parts" / name).read_text() == text for name, text in kept.items())


def grade(_: int, body: dict[str, Any]) -> str:
    """The reference gets 8 and the candidate 6, wherever they stand; question 1 gets no scores."""
    text = question_of(body)
    if "picture 1?" in text:
        return "I would rather not say."
    first = "Reference" in text.partition("[End of Assistant 1]")[0].partition("[Assistant 1]")[2]
    return "8 6\nThe first is better." if first else "6, 8\nThe second is better."


def test_the_judge_in_both_orders_and_several_runs(tmp_path: Path) -> None:
    data = make_llava_bench(tmp_path / "bench")
    out = tmp_path / "out"
    with ChatServer(lambda *_: "A cup.") as model, ChatServer(grade) as judge:
        command = [
            "--endpoint", model.url, "--endpoint-model", "m", "--tasks", "llava_bench", "--out", out,
            f"llava_bench.folder={data}", "--judge-url", judge.url, "--judge-model", "judge-1",
            "--judge-runs", 3, "--judge-order", "both",
        ]  # fmt: skip
        done = evaluate(*command)
        assert done.returncode == 0, done.stderr
        assert len(judge.calls) == 6 * 2 * 3
        again = evaluate(*command)
        assert (len(model.calls), len(judge.calls)) == (6, 36)
        assert json.loads(again.stdout) == json.loads(done.stdout)
    found = json.loads(done.stdout)["llava_bench"]
    assert (found["relative_score"], found["runs"], found["parse_failures"]) == (75.0, 3, 6)
    paths = sorted(str(path) for path in (out / "llava_bench").glob("reviews-*.jsonl"))
    assert score_reviews({path: read_reviews(path) for path in paths}).figures["relative_score"] == 75.0
    row = json.loads(Path(paths[0]).read_text().splitlines()[0])
    assert (row["judge"], row["answered_by"], row["temperature"]) == ("judge-1", "served-model-0613", 0.2)
    assert (row["category"], row["order"], row["tuple"]) == ("llava_bench_conv", "reference_first", [8, 6])
    assert len(row["prompt_digest"]) == 64
    swapped = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()][1]
    assert (swapped["order"], swapped["content"][:4], swapped["tuple"]) == ("candidate_first", "6, 8", [8, 6])


def test_scienceqa_with_a_second_model_and_a_judge(tmp_path: Path) -> None:
    data = make_scienceqa(tmp_path / "sqa")  # the right answers are A B C A B C
    second = tmp_path / "second.json"
    second.write_text(json.dumps({str(n): f"The answer is {'ABCBAA'[n]}." for n in range(6)}))
    out = tmp_path / "out"

    def decide(_: int, body: dict[str, Any]) -> str:
        return "Neither." if "number 3?" in question_of(body) else "The answer is C."

    with ChatServer(lambda *_: "The answer is A.") as model, ChatServer(decide) as judge:
        command = [
            "--endpoint", model.url, "--endpoint-model", "m", "--tasks", "scienceqa", "--out", out,
            f"scienceqa.folder={data}", f"scienceqa.second={second}",
        ]  # fmt: skip
        done = evaluate(*command)
        assert json.loads(done.stdout)["scienceqa"]["ensemble"]["correct"] == 3
        judged = [*command, "scienceqa.ensemble=judge", "--judge-url", judge.url, "--judge-model", "j"]
        found = json.loads(evaluate(*judged).stdout)["scienceqa"]["ensemble"]
        assert (len(model.calls), len(judge.calls)) == (6, 3)  # they differ on 1, 2 and 3
        assert (found["correct"], found["differ"], found["judge_unparsable"]) == (3, 3, 1)
        arguments = [
            "score", "scienceqa", "--problems", data / "problems.json", "--splits", data / "pid_splits.json",
            "--predictions", out / "scienceqa" / "answers.jsonl", "--second", second, "--ensemble", "judge",
        ]  # fmt: skip
        kept = figures(*arguments, "--judged", out / "scienceqa" / "judged.jsonl")
        assert kept["ensemble"] == found
        live = ["--judge-url", judge.url, "--judge-model", "j", "--judge-temperature", 0.2]
        asked = figures(*arguments, *live, "--judge-out", out)
        assert asked["ensemble"] == found
        assert len(judge.calls) == 3  # kept from before


@pytest.mark.parametrize(
    ("written", "message"),
    [(None, "scienceqa.second"), ('{"77": "A"}', "answers no problem of the split")],
)
def test_a_second_model_without_a_word_on_the_questions_is_told_before_they_are_asked(
    tmp_path: Path, written: str | None, message: str
) -> None:
    data = make_scienceqa(tmp_path / "sqa")
    second = tmp_path / "second.json"
    if written is not None:
        second.write_text(written)
    with ChatServer(lambda *_: "The answer is A.") as model:
        done = evaluate(
            "--endpoint", model.url, "--endpoint-model", "m", "--tasks", "scienceqa", "--out",
            tmp_path / "out", f"scienceqa.folder={data}", f"scienceqa.second={second}",
        )  # fmt: skip
        assert not model.calls
    assert done.returncode == 2
    assert message in done.stderr


def test_the_prompt_has_the_original_layout(tmp_path: Path) -> None:
    data = make_llava_bench(tmp_path / "bench")
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": "Grade them."},
                                 "default": {"role": "Robot", "prompt": "Any."}}))  # fmt: skip
    (task,) = make_tasks(["llava_bench"], [f"llava_bench.folder={data}", f"llava_bench.rules={rules}"])
    first, second, *_ = task.requests({str(n): f"Answer {n}." for n in range(6)})  # type: ignore[attr-defined]
    assert first.prompt == (
        "[Context]\nA cup numbered 0.\n\n[Question]\nWhat is in picture 0?\n\n"
        "[Assistant 1]\nReference 0.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nAnswer 0.\n\n[End of Assistant 2]\n\n[System]\nGrade them.\n\n"
    )
    assert "[Robot 1]" in second.prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "scienceq", "--model", "x"], "did you mean 'scienceqa'"),
        (["--tasks", "pope", "--model", "x", "pope.foldr=1"], "did you mean 'folder'"),
        (["--tasks", "pope", "--model", "x", "vqa.data=1"], "not asked for"),
        (["--tasks", "pope", "--endpoint", "http://u:p@host", "--endpoint-model", "m"], "password"),
        (["--tasks", "pope", "--endpoint", "http://127.0.0.1:9"], "--endpoint-model"),
        (["--tasks", "pope", "--model", "x", "--batch-size", "0"], "at least 1"),
        (["--tasks", "llava_bench", "--model", "x", "--judge-url", "http://h"], "--judge-model"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = evaluate(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr


def test_help_tells_both_forms() -> None:
    done = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, timeout=60)
    assert "--judge-model" in done.stdout
    assert "--recipe" in done.stdout
    step = subprocess.run([*SCRIPT, "--recipe", "tiny", "--help"], capture_output=True, text=True, timeout=60)
    assert "--dry-run" in step.stdout
    assert "Runs the step 'evaluate'" in step.stdout
