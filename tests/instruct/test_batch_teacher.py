"""pipelines/generate.py with files of a batch API in place of an endpoint: from first file to last."""

import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayva.errors import DataError
from rayva.instruct.contexts import Context
from rayva.instruct.prompts import PromptSet
from rayva.instruct.tasks import KINDS, Task
from rayva.instruct.teachers import Requests, batch_lines, read_batch_results
from rayva.llm.cache import AnswerCache
from rayva.orchestration import generate_entry
from rayva.orchestration.generate_batch import BatchFiles, read_batches, split_lines, write_batch_files
from rayva.orchestration.generate_run import Plan, write_outputs
from rayva.recipes.schema import Generation
from rayva.storage import Storage
from tests.instruct.planned import batch_plan, outcomes_of, price_of
from tests.llm.teacher import in_format

DOG = Context("7", "7.jpg", ("A dog runs over the grass.",))
ROOT = Path(__file__).resolve().parents[2]
IMAGES = 6
SAMPLES = 3 * IMAGES


def _contexts(path: Path) -> Path:
    rows = [
        {"id": f"i{n}", "image": f"i{n}.jpg", "captions": [f"Dog number {n} runs over the grass."]}
        for n in range(IMAGES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(request: dict[str, Any], text: str | None = None, **response: Any) -> dict[str, Any]:
    """What OpenAI's batch API writes for a request."""
    body = request["body"]
    said = in_format(body, int(request["custom_id"][:6], 16)) if text is None else text
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    completion = {"id": "c", "object": "chat.completion", "model": body["model"], "choices": [choice]}
    done = {"status_code": 200, "request_id": "r", "body": {**completion, "usage": usage}, **response}
    return {"id": "b", "custom_id": request["custom_id"], "response": done, "error": None}


def failed(request: dict[str, Any], how: int) -> dict[str, Any]:
    """The three ways in which a result tells that there is none."""
    expired = {"code": "batch_expired", "message": "This request could not be executed in time."}
    if how == 0:
        return {"id": "b", "custom_id": request["custom_id"], "response": None, "error": expired}
    if how == 1:
        return result(request, status_code=429, body={"error": {"message": "slow down"}})
    return result(request, body={"choices": []})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.thorough
def test_from_the_first_file_to_the_last(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    command = [
        sys.executable, "pipelines/generate.py", "--storage", str(storage), "--teacher", "batch",
        "--input", str(_contexts(tmp_path / "contexts.jsonl")), "--model", "m", "--kinds", "1:1:1",
    ]  # fmt: skip

    def run(code: int, *results: Path) -> str:
        more = ["--batch-results", *map(str, results)] if results else []
        job = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert job.returncode == code, job.stdout + job.stderr[-3000:]
        return job.stdout

    def requests() -> list[dict[str, Any]]:
        [path] = storage.glob("steps/generate-*/batch/requests-*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert "To be given to the batch API" in run(3)
    asked = requests()
    assert len({row["custom_id"] for row in asked}) == SAMPLES
    assert {(row["method"], row["url"]) for row in asked} == {("POST", "/v1/chat/completions")}

    # What comes first: a part, with errors, a refusal, lines of another batch, and cut at its end.
    good, broken, refused = asked[: SAMPLES // 2], asked[-4:-1], asked[-1]
    rows = [*map(result, good), *(failed(row, how) for how, row in enumerate(broken))]
    rows += [
        result(refused, "I'm sorry, but I cannot help with that."),
        result(good[0] | {"custom_id": "f" * 64}),
    ]
    part = tmp_path / "part.jsonl"
    part.write_text("\n\n".join(map(json.dumps, rows)) + '\n{"id": "b", "custom_id": "')
    said = run(3, part)
    for count in ("'read': 10", "'failed': 3", "'foreign': 1", "'cut': 1"):
        assert count in said
    left = requests()
    assert len(left) == SAMPLES - len(good)
    again = [row for row in left if row["custom_id"] not in {row["custom_id"] for row in asked}]
    [*shown, last] = refused["body"]["messages"]
    assert [row["body"]["messages"][:-1] for row in again] == [shown]
    assert again[0]["body"]["messages"][-1]["content"].startswith(last["content"] + "\n\nWrite it afresh")

    rest = tmp_path / "rest.jsonl.gz"
    rest.write_bytes(gzip.compress("".join(json.dumps(result(row)) + "\r\n" for row in left).encode()))
    assert "'known': 13" in run(0, rest, part)  # what had failed in it is known now
    [table] = storage.glob("steps/generate-*/samples.parquet")
    samples = pq.read_table(table).to_pylist()
    assert Counter(row["kind"] for row in samples) == dict.fromkeys(KINDS, IMAGES)
    assert {(row["teacher"], row["model"], row["prompt_tokens"]) for row in samples} == {("batch", "m", 100)}
    assert len({row["id"] for row in samples}) == SAMPLES
    assert not list(storage.glob("steps/generate-*/batch/*"))


def _asked(files: BatchFiles) -> list[dict[str, Any]]:
    return [json.loads(line) for uri in files.uris for line in Path(uri).read_text().splitlines()]


def _answer(plan: Plan, folder: Path, rows: list[dict[str, Any]], text: str | None = None) -> None:
    results = folder / "results.jsonl"
    results.write_text("".join(json.dumps(result(row, text)) + "\n" for row in rows))
    assert read_batches(plan, [str(results)])["read"] == len(rows)


def test_answers_that_come_twice_are_asked_again_and_end(tmp_path: Path) -> None:
    plan = batch_plan(tmp_path, ["A dog runs.", "A cat sits."], attempts=3)
    canned = "There is something to be seen in this picture, and it is worth a long look at the whole of it."
    asked = []
    for _ in range(plan.settings.attempts):
        files = write_batch_files(plan, outcomes_of(plan), price_of(plan))
        asked.append(files.requests)
        _answer(plan, tmp_path, _asked(files), canned)
    outcomes = outcomes_of(plan)
    assert asked == [2, 1, 1]
    assert [outcome.status for outcome in outcomes.values()] == ["accepted", "rejected"]
    assert [attempt.reason for attempt in outcomes[1].attempts] == ["duplicate"] * 3
    assert write_batch_files(plan, outcomes, price_of(plan)).uris == []


def test_a_later_run_with_more_attempts_goes_on_with_what_was_rejected(tmp_path: Path, capsys) -> None:
    plan = batch_plan(tmp_path, ["A dog runs.", "A cat sits."], attempts=3)
    [bad, good] = _asked(write_batch_files(plan, outcomes_of(plan), price_of(plan)))
    _answer(plan, tmp_path, [good])
    for _ in range(plan.settings.attempts):
        [bad] = _asked(write_batch_files(plan, outcomes_of(plan), price_of(plan)))
        _answer(plan, tmp_path, [bad], "I'm sorry, but I cannot help with that.")
    outcomes = outcomes_of(plan)
    assert Counter(outcome.status for outcome in outcomes.values()) == {"accepted": 1, "rejected": 1}
    generate_entry._show(plan, write_outputs(plan, outcomes, 1.0))
    said = "1 sample was rejected after 3 attempts; generation.attempts=6 asks again."
    assert said in capsys.readouterr().out
    more = batch_plan(tmp_path, ["A dog runs.", "A cat sits."])
    assert more.folder.rel != plan.folder.rel
    assert more.settings.attempts == 6
    [again] = _asked(write_batch_files(more, outcomes_of(more), price_of(more)))
    _answer(more, tmp_path, [again])
    assert [outcome.status for outcome in outcomes_of(more).values()] == ["accepted"] * 2


def test_the_same_request_is_written_once(tmp_path: Path) -> None:
    plan = batch_plan(tmp_path, ["A dog runs."] * 3)
    files = write_batch_files(plan, outcomes_of(plan), price_of(plan))
    assert (files.requests, len(_asked(files))) == (1, 1)
    _answer(plan, tmp_path, _asked(files))
    assert [outcome.status for outcome in outcomes_of(plan).values()] == ["accepted", "waiting", "waiting"]


def test_max_cost_holds_for_batch_files(tmp_path: Path) -> None:
    captions = [f"Dog number {n} runs over the grass." for n in range(6)]
    all_files = write_batch_files(
        whole := batch_plan(tmp_path, captions), outcomes_of(whole), price_of(whole)
    )
    assert (all_files.requests, all_files.left_out) == (6, 0)
    each = all_files.cost_at_most / 6
    plan = batch_plan(tmp_path, captions, max_cost=2.5 * each)
    files = write_batch_files(plan, outcomes_of(plan), price_of(plan))
    assert (files.requests, files.left_out) == (2, 4)
    assert files.cost_at_most == pytest.approx(2 * each)
    assert files.cost_at_most <= 2.5 * each
    # The answers cost 150 tokens each, much less than they might have: there is room for another request.
    _answer(plan, tmp_path, _asked(files))
    more = write_batch_files(plan, outcomes_of(plan), price_of(plan))
    assert 0.3 + more.cost_at_most <= 2.5 * each < 0.3 + more.cost_at_most + each
    assert more.requests + more.left_out == 4
    spent = batch_plan(tmp_path, captions, max_cost=0.3)
    assert write_batch_files(spent, outcomes_of(spent), price_of(spent)).requests == 0


def test_files_are_no_larger_than_the_batch_api_takes() -> None:
    lines = [b"x" * size for size in (5, 5, 5, 30, 1, 1, 1, 1)]
    files = list(split_lines(lines, most_lines=3, most_bytes=12))
    assert [len(content) for content in files] == [10, 5, 30, 3, 1]
    assert b"".join(files) == b"".join(lines)
    assert list(split_lines([])) == []


def _read(folder: Path, content: bytes) -> dict[str, int]:
    requests = Requests(Generation(teacher="batch", model="m"), PromptSet.load())
    known = {request.digest: request for request in (requests.of(Task(kind, 0, DOG)) for kind in KINDS)}
    path = folder / "results.jsonl"
    path.write_bytes(content)
    cache = AnswerCache(Storage(str(folder / "storage")))
    try:
        return read_batch_results(str(path), known.get, cache)
    finally:
        cache.close()


def _requests() -> list[dict[str, Any]]:
    requests = Requests(Generation(teacher="batch", model="m"), PromptSet.load())
    return [json.loads(line) for line in batch_lines(requests.of(Task(kind, 0, DOG)) for kind in KINDS)]


def test_any_line_is_counted_or_named(tmp_path: Path) -> None:
    """Damaged result files: no crash, no answer that the API did not give, and the line of the fault."""
    rng = random.Random(1)
    whole = [json.dumps(result(row)).encode() for row in _requests()]
    outcomes: Counter[str] = Counter()
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        lines = [_damaged(line, rng) if rng.random() < 0.4 else line for line in whole]
        try:
            counts = _read(folder, b"\r\n".join(lines))
        except DataError as error:
            outcomes["refused" if re.search("line [1-3] is not a result", str(error)) else str(error)] += 1
        else:
            assert sum(counts.values()) <= len(lines)
            outcomes.update({name: 1 for name, count in counts.items() if count})
    assert outcomes.keys() == {"read", "refused", "cut", "failed", "foreign"}


def _damaged(line: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(line))
    values = ("null", "7", "[]", '"x"', "{}", '{"error": null}')
    keys = ("response", "body", "choices", "message", "content", "usage", "custom_id", "error", "status_code")
    row = json.loads(line)
    place = rng.choice([row, row["response"], row["response"]["body"], row["response"]["body"]["choices"][0]])
    place[rng.choice(keys)] = json.loads(rng.choice(values))
    return rng.choice([line[:at], line[at:], json.dumps(row).encode(), rng.choice(values).encode()])


def test_results_are_written_together_also_those_before_a_bad_line(tmp_path: Path) -> None:
    """On an object store each write is an object of its own."""
    lines = [json.dumps(result(row)) for row in _requests()]
    with pytest.raises(DataError, match="line 3"):
        _read(tmp_path, "\n".join([lines[0], lines[1], "[]", lines[2]]).encode())
    found = AnswerCache(Storage(str(tmp_path / "storage")))
    assert len(found) == 2
    storage = Storage(f"memory://{tmp_path.name}")
    cache = AnswerCache(storage)
    requests = Requests(Generation(teacher="batch", model="m"), PromptSet.load())
    known = {request.digest: request for request in (requests.of(Task(kind, 0, DOG)) for kind in KINDS)}
    (tmp_path / "r.jsonl").write_text("\n".join(lines + lines))
    counts = read_batch_results(str(tmp_path / "r.jsonl"), known.get, cache)
    assert (counts["read"], counts["known"]) == (3, 3)
    assert len(storage.list("answers")) == 1


def test_results_given_twice_change_nothing(tmp_path: Path) -> None:
    first, second = ("\n".join(json.dumps(result(row, words)) for row in _requests()) for words in ("A", "B"))
    assert _read(tmp_path, first.encode())["read"] == 3
    assert _read(tmp_path, second.encode()) == {"read": 0, "known": 3, "failed": 0, "foreign": 0, "cut": 0}
