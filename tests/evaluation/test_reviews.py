"""LLaVA-Bench from files of reviews: the published figure, failures, the original's treatment, bad files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import DataError
from rayva.evaluation.reviews import FAILED, parse_scores, read_reviews, score_reviews
from tests.evaluation.released import figures, rayva
from tests.reference import ROOT, WILD, needs


def review(number: int, scores: list[float], **fields: Any) -> dict[str, Any]:
    return {"question_id": number, "category": "conv", "content": "", "tuple": scores, **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@needs(WILD)
def test_the_published_reviews_of_llava_1_5_13b() -> None:
    found = figures("score", "llava-bench", "--reviews", *sorted(WILD.glob("*.jsonl")))
    assert round(found["relative_score"], 2) == 72.55
    assert [round(score, 2) for score in found["scores"]] == [72.83, 72.74, 72.07]
    assert found["parse_failures"] == 0
    assert set(found["by_category"]) == {f"llava_bench_{name}" for name in ("conv", "detail", "complex")}
    counts = next(iter(found["each_run"].values()))["by_category"]
    assert sum(cell["reviews"] for cell in counts.values()) == 60


@pytest.mark.parametrize(
    ("content", "scores"),
    [
        ("8 9\nBoth are good.", (8.0, 9.0)),
        ("8, 9.5", (8.0, 9.5)),
        ("8 9 7\n", FAILED),
        ("Assistant 1: 8", FAILED),
        ("\n8 9", FAILED),
        ("-1 -1", FAILED),
        ("nan 3", FAILED),
        ("inf 3", FAILED),
        ("", FAILED),
    ],
)
def test_scores_are_read_from_the_first_line(content: str, scores: tuple[float, float]) -> None:
    assert parse_scores(content) == scores


@pytest.mark.parametrize(
    ("content", "scores"),
    [
        ("8 7\nBoth are good.", (8.0, 7.0)),
        ("8,7", (8.0, 7.0)),
        ("8 9.5\r\n", (8.0, 9.5)),
        ("8, 7", FAILED),
        ("8  7", FAILED),
        (" 8 7", FAILED),
        ("8 7 ", FAILED),
        ("8\t7", FAILED),
        ("nan 3", FAILED),
    ],
)
def test_the_original_takes_one_space_or_comma_alone(content: str, scores: tuple[float, float]) -> None:
    """As its parse_score: replace(",", " ") and split(" ") of the first line."""
    assert parse_scores(content, "original") == scores


def test_the_originals_rule_reads_content_and_our_own_judge_but_no_scores_of_others(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "category": "conv", "content": "8, 6"},
        review(2, [8, 6], content="8, 6", judge="j"),
        review(3, [6, 8], content="8 6", judge="j", order="candidate_first"),
        review(4, [8, 6], content="8, 6"),  # mended by hand, or written by another script
    ]
    path = write(tmp_path / "r.jsonl", rows)
    assert [row.scores for row in read_reviews(path)] == [(8, 6), (8, 6), (6, 8), (8, 6)]
    strict = [FAILED, FAILED, (6, 8), (8, 6)]
    assert [row.scores for row in read_reviews(path, compat="original")] == strict
    found = figures("score", "llava-bench", "--reviews", path, "--compat", "original")
    assert (found["parse_failures"], found["relative_score"]) == (2, 100.0)


def test_failures_are_left_out_unless_the_original_is_wanted(tmp_path: Path) -> None:
    rows = [review(0, [10, 5]), review(1, [10, 7]), review(2, [-1, -1], category="detail")]
    runs = {"run": read_reviews(write(tmp_path / "r.jsonl", rows))}
    found = score_reviews(runs).figures
    assert found["relative_score"] == 60.0
    assert found["parse_failures"] == 1
    assert found["by_category"]["detail"]["relative_score"] is None
    original = score_reviews(runs, "original").figures
    assert original["relative_score"] == round(100 * 11 / 19, 4)


def test_vicuna_reviews_and_the_other_answer(tmp_path: Path) -> None:
    rows = [
        {
            "review_id": "a",
            "question_id": n,
            "answer1_id": "x",
            "answer2_id": "y",
            "text": "...",
            "score": score,
        }
        for n, score in enumerate([[8, 10], [6, 10]])
    ]
    path = write(tmp_path / "vicuna.jsonl", rows)
    assert score_reviews({path: read_reviews(path)}).figures["relative_score"] == round(100 * 20 / 14, 4)
    found = figures("score", "llava-bench", "--candidate", 1, "--reviews", path)
    assert found["relative_score"] == 70.0
    assert found["by_category"] == {}


def test_both_orders_of_a_question_are_one_run(tmp_path: Path) -> None:
    rows = [review(0, [10, 5], order="reference_first"), review(0, [8, 7], order="candidate_first")]
    scored = score_reviews({"run": read_reviews(write(tmp_path / "r.jsonl", rows))})
    assert scored.figures["relative_score"] == round(100 * 12 / 18, 4)
    assert scored.rows[0].parts["relative_score"] == [(12.0, 18.0)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "text": "an answer"}], "neither tuple nor score"),
        ([{"tuple": [1, 2]}], "no question_id"),
        ([review(1, [1, 2]), review(1, [1, 2])], "again"),
        ([review(1, [1])], "two scores"),
        ([review(1, [True, 2])], "expected a number"),
        ([review(1, [1, 2]), {"question_id": 2, "tuple": [1, 2]}], "do not mix"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_reviews(write(tmp_path / "r.jsonl", rows))


def test_cut_and_unequal_runs_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", [review(n, [9, 8]) for n in range(3)])
    short = write(tmp_path / "short.jsonl", [review(n, [9, 8]) for n in range(2)])
    refused = rayva("score", "llava-bench", "--reviews", whole, short)
    assert refused.returncode == 2
    assert "different questions" in refused.stderr
    cut = tmp_path / "cut.jsonl"
    cut.write_text(Path(whole).read_text()[:-20])
    with pytest.raises(DataError, match="line 3"):
        read_reviews(str(cut))


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    """`rayva score ... | head`: the output is longer than a pipe holds."""
    path = tmp_path / "r.jsonl"
    rows = ({"question_id": n, "category": f"category {n}", "tuple": [5, 6]} for n in range(2000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = subprocess.Popen(
        [sys.executable, "-m", "rayva.cli", "score", "llava-bench", "--reviews", str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
