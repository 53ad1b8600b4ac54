"""Released files as people have them: saved by other editors, packed, and in each form that scripts write."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import DataError
from rayva.evaluation.predictions import read_predictions
from rayva.evaluation.reviews import FAILED, read_reviews, score_reviews
from tests.evaluation.released import figures
from tests.reference import SCIENCEQA, WILD, needs

TEXTS = {"3": "The answer is A.", "10": "B", "11": "C. bl\u00fc\u2028e", "12": ""}


def lines(rows: list[dict[str, Any]], **how: Any) -> str:
    return "".join(json.dumps(row, **how) + "\n" for row in rows)


def saved(text: str, way: str) -> bytes:
    """`text` as an editor, a mailer or a script leaves it."""
    ways: dict[str, Callable[[str], bytes]] = {
        "plain": lambda t: t.encode(),
        "bom": lambda t: b"\xef\xbb\xbf" + t.encode(),
        "crlf": lambda t: t.replace("\n", "\r\n").encode(),
        "blank lines": lambda t: ("\n\n" + t.replace("}\n", "}\n \n\t\n") + "\n\n").encode(),
        "bom, crlf, blank lines": lambda t: b"\xef\xbb\xbf\r\n" + t.replace("}\n", "}\r\n\r\n").encode(),
        "no last line break": lambda t: t.rstrip("\n").encode(),
        "gzip": lambda t: gzip.compress(t.encode()),
    }
    return ways[way](text)


WAYS = ("plain", "bom", "crlf", "blank lines", "bom, crlf, blank lines", "no last line break", "gzip")
ROWS = [
    {"question_id": key, "prompt": "?", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
    for key, text in TEXTS.items()
]
RESULTS = {"3": 0, "10": 1, "11": 2, "12": -1}
PREDICTIONS = {
    "lines": lines(ROWS),
    "lines, not escaped": lines(ROWS, ensure_ascii=False),
    "array": json.dumps(ROWS),
    "array, indented": json.dumps(ROWS, indent=4),
    "results": json.dumps({"acc": 1, "correct": 1, "count": 4, "results": RESULTS, "outputs": TEXTS}),
    "results, indented": json.dumps({"results": RESULTS, "outputs": TEXTS, "shot_qids": []}, indent=2),
    "analysed": json.dumps(
        {
            "correct": [{"question_id": "3", "parsed_ans": "A", "ground_truth": "A", "pred": TEXTS["3"]}],
            "incorrect": [{"question_id": k, "pred": TEXTS[k]} for k in ("10", "11", "12")],
        }
    ),
    "by id": json.dumps(TEXTS, indent=1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", PREDICTIONS)
def test_predictions_are_the_same_however_they_were_saved(tmp_path: Path, form: str, way: str) -> None:
    path = tmp_path / ("p.json.gz" if way == "gzip" else "p.json")
    path.write_bytes(saved(PREDICTIONS[form], way))
    found = read_predictions(str(path))
    assert found.outputs == TEXTS
    assert found.indices == (RESULTS if form.startswith("results") else None)


REVIEW = {"question_id": 1, "category": "llava_bench_conv", "order": "reference_first"}
REVIEWS = {
    "tuple and content": {
        "id": 7,
        "answer1_id": "a",
        "answer2_id": "b",
        "content": "9 7\n.",
        "tuple": [9, 7],
    },
    "tuple and text": {"text": "9 7\nBecause", "tuple": [9.0, 7.0]},
    "tuple alone": {"tuple": [9, 7]},
    "score and text": {"review_id": "r", "reviewer_id": 1, "text": "9 7\n...", "score": [9, 7]},
    "score and content": {"content": "whatever", "score": [9, 7]},
    "tuple before score": {"tuple": [9, 7], "score": [1, 1]},
    "content alone": {"content": "9, 7\nThe first is better."},
    "text of two answers": {"answer1_id": "a", "answer2_id": "b", "text": "9 7"},
    "tuple is null": {"tuple": None, "content": "9 7"},
    "content is null": {"tuple": [9, 7], "content": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_reviews_are_the_same_however_they_were_saved(tmp_path: Path, way: str) -> None:
    rows = [{**REVIEW, **fields, "question_id": n} for n, fields in enumerate(REVIEWS.values())]
    path = tmp_path / ("r.jsonl.gz" if way == "gzip" else "r.jsonl")
    path.write_bytes(saved(lines(rows), way))
    found = read_reviews(str(path))
    assert [review.scores for review in found] == [(9.0, 7.0)] * len(REVIEWS)
    assert score_reviews({"r": found}).figures["relative_score"] == round(700 / 9, 4)


@pytest.mark.parametrize(
    "fields",
    [{"tuple": [-1, -1]}, {"score": [-1, -1], "text": "?"}, {"content": "I cannot say."}, {"content": "10"}],
)
def test_failed_reviews_in_each_form(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(lines([{**REVIEW, **fields}]))
    assert [review.scores for review in read_reviews(str(path))] == [FAILED]


@pytest.mark.parametrize("fields", [{"text": "9 7"}, {"content": ""}, {"tuple": None}, {"score": "9 7"}])
def test_rows_without_scores_are_no_reviews(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(lines([{**REVIEW, **fields}]))
    with pytest.raises(DataError, match="row 1"):
        read_reviews(str(path))


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content in (lines(ROWS).encode("utf-16"), b"\xff" + lines(ROWS).encode(), gzip.compress(b"{}")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"p\.json"):
            read_predictions(str(path))


@needs(WILD)
def test_the_released_reviews_saved_elsewhere(tmp_path: Path) -> None:
    """As a spreadsheet saves them, and as an older script names their fields."""
    paths = []
    for number, path in enumerate(sorted(WILD.glob("*.jsonl"))):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        renamed = [
            {**{k: v for k, v in row.items() if k not in ("tuple", "content")}, "score": row["tuple"],
             "text": row["content"]}
            for row in rows
        ]  # fmt: skip
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_bytes(saved(lines(renamed, ensure_ascii=False), "bom, crlf, blank lines"))
    found = figures("score", "llava-bench", "--reviews", *paths)
    assert round(found["relative_score"], 2) == 72.55
    assert [round(score, 2) for score in found["scores"]] == [72.83, 72.74, 72.07]


@needs(SCIENCEQA)
def test_the_released_predictions_in_another_form(tmp_path: Path) -> None:
    """The outputs alone, as model_vqa_science.py writes them: 90.90 %, and no stored index."""
    whole = json.loads((SCIENCEQA / "llava_13b_v0_predictions.json").read_text())
    path = tmp_path / "answers.jsonl"
    rows = [{"question_id": key, "prompt": "?", "text": text} for key, text in whole["outputs"].items()]
    path.write_bytes(saved(lines(rows), "bom, crlf, blank lines"))
    found = figures(
        "score", "scienceqa", "--problems", SCIENCEQA / "problems_test_partial.json",
        "--splits", SCIENCEQA / "pid_splits.json", "--predictions", path,
    )  # fmt: skip
    assert (found["from_outputs"]["correct"], found["from_outputs"]["count"]) == (3855, 4241)
    assert found["from_indices"] is None
