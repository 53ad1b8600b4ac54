"""POPE against an example computed by hand, and how answers find their questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import DataError
from rayva.evaluation.tasks.pope import (
    Pope,
    PopeSettings,
    match_answers,
    read_labels,
    says_yes,
    score_answers,
)
from tests.evaluation.released import figures

LABELS = ["yes", "no", "yes", "no", "yes"]
ANSWERS = ["Yes", "Yes, there is.", "No. Yes!", "There is not.", "It is, yes"]
# By hand: tp 2 (1, 5), fp 1 (2), fn 1 (3), tn 1 (4).
BY_HAND = {
    "accuracy": 60.0, "precision": 66.6667, "recall": 66.6667, "f1": 66.6667, "share_of_yes": 60.0,
    "tp": 2, "fp": 1, "fn": 1, "tn": 1,
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labels(folder: Path, category: str, start: int = 1) -> str:
    rows = [
        {
            "question_id": start + n,
            "image": f"{n}.jpg",
            "text": "Is there a cup in the image?",
            "label": label,
        }
        for n, label in enumerate(LABELS)
    ]
    return write(folder / f"coco_pope_{category}.json", rows)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("no", False),
        ("No, there is none.", False),
        ("NO", True),  # as the original reads it: only No, no and not
        ("Nothing of the kind", True),
        ("I do not see one. Yes.", False),
        ("", True),
    ],
)
def test_answers_are_read_as_the_original_does(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_the_example_computed_by_hand(tmp_path: Path) -> None:
    path = labels(tmp_path, "random")
    answers = write(
        tmp_path / "a.jsonl", [{"question_id": n + 1, "text": text} for n, text in enumerate(ANSWERS)]
    )
    found = figures("score", "pope", "--labels", path, "--predictions", answers)
    assert {name: found[name] for name in BY_HAND} == BY_HAND
    assert found["by_category"]["random"]["count"] == 5
    assert found["neither_yes_nor_no"] == 0


def test_answers_of_several_categories(tmp_path: Path) -> None:
    paths = [labels(tmp_path, category) for category in ("random", "popular")]
    questions = write(
        tmp_path / "q.jsonl",
        [{"question_id": 100 + n, "category": ("random", "popular")[n // 5]} for n in range(10)],
    )
    answers = write(
        tmp_path / "a.jsonl", [{"question_id": 100 + n, "text": (ANSWERS * 2)[n]} for n in range(10)]
    )
    found = figures("score", "pope", "--labels", *paths, "--predictions", answers, "--questions", questions)
    for category in ("random", "popular"):
        assert {name: found["by_category"][category][name] for name in BY_HAND} == BY_HAND
    assert found["mean_f1"] == BY_HAND["f1"]
    own = [{"question_id": f"random/{n + 1}", "text": text} for n, text in enumerate(ANSWERS)]
    groups = {questions[0].category: questions for questions in map(read_labels, paths)}
    scored = score_answers([q for g in groups.values() for q in g], match_answers(groups, own, "own"))
    assert scored.figures["missing"] == 5
    assert scored.figures["by_category"]["random"]["f1"] == BY_HAND["f1"]


def test_answers_and_labels_that_do_not_belong_together(tmp_path: Path) -> None:
    groups = {"random": read_labels(labels(tmp_path, "random"))}
    with pytest.raises(DataError, match="has 2 answers"):
        match_answers(groups, [{"answer": "yes"}, {"answer": "no"}], "a")
    with pytest.raises(DataError, match="more than once"):
        match_answers(groups, [{"question_id": 1, "text": "yes"}] * 5, "a")
    with pytest.raises(DataError, match="category"):
        match_answers(groups, [{"category": "popular", "text": "yes"}], "a")
    by_order = match_answers(groups, [{"answer": text} for text in ANSWERS], "a")
    assert by_order["random/5"] == ANSWERS[4]
    bad = write(tmp_path / "coco_pope_bad.json", [{"question_id": 1, "text": "?", "label": "maybe"}])
    with pytest.raises(DataError, match="not yes or no"):
        read_labels(bad)


def test_the_task_asks_in_one_word_with_the_image(tmp_path: Path) -> None:
    labels(tmp_path, "random")
    (tmp_path / "val2014").mkdir()
    items = Pope(PopeSettings(folder=str(tmp_path))).read()
    assert items[0].item_id == "random/1"
    assert items[0].question.endswith("single word or phrase.")
    assert items[0].pictures[0].uri == str(tmp_path / "val2014" / "0.jpg")
