"""Files of predictions and reviews, damaged in every way: each is scored or refused with a reason.

Any other exception than one that names the trouble fails; so does a figure that is not a share.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import DataError
from rayva.evaluation.predictions import read_predictions
from rayva.evaluation.reading import read_rows
from rayva.evaluation.reviews import read_reviews, score_reviews
from rayva.evaluation.rules import read_contexts, read_rules
from rayva.evaluation.tasks import pope, scienceqa, scienceqa_ensemble, vqa
from tests.evaluation.bench_data import make_llava_bench, make_pope, make_scienceqa, make_vqa

EACH = 250
"""Damaged files of each kind; eight kinds."""
ODD: list[Any] = [
    None, True, False, 0, -1, 3, 10**400, 1e308, -0.5, "", "B", "The answer is Z.", "\ud800", "\0", [],
    [1, 2], {}, {"text": None}, "8 9", "nan nan", [-1, -1], [1e400, 1], ["8", "9"], [None, 1], "A" * 999,
]  # fmt: skip


def damage_value(value: Any, rng: random.Random) -> Any:
    """One place in a JSON value changed, removed, doubled, or put elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        copy = dict(value)
        action = rng.randrange(4)
        if action == 0:
            copy.pop(key)
        elif action == 1:
            copy[rng.choice(["question_id", "text", "tuple", "x", "", key + "2"])] = copy.pop(key)
        elif action == 2:
            copy[key] = rng.choice(ODD)
        else:
            copy[key] = damage_value(value[key], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        action = rng.randrange(4)
        if action == 0:
            return value[:index] + value[index + 1 :]
        if action == 1:
            return [*value, value[index]]
        replaced = rng.choice(ODD) if action == 2 else damage_value(value[index], rng)
        return [*value[:index], replaced, *value[index + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", ".", "\n", "The answer is B.", ",", " "]) + value[at + 1 :]
    return rng.choice(ODD)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    action = rng.randrange(6)
    at = rng.randrange(len(content) + 1)
    if action == 0:
        return content[:at]
    if action == 1:
        return content[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8))) + content[at:]
    if action == 2:
        return content[: at // 2] + content[at:]
    if action == 3:
        return content + content[:at]
    if action == 4:
        return content.replace(b'"', b"'", rng.randrange(1, 4))
    return rng.choice([b"", b"\n\n", b"null", b"[", b"{}", b"[]", b"\xff\xfe", b'"text"', b"7", b"NaN"])


def damaged(value: Any, as_lines: bool, rng: random.Random) -> bytes:
    """The file with one to three values damaged, or its bytes."""
    if rng.random() < 0.4:
        return damage_bytes(dump(value, as_lines), rng)
    for _ in range(rng.randrange(1, 4)):
        value = damage_value(value, rng)
    as_lines = as_lines and isinstance(value, list)
    return dump(value, as_lines)


def dump(value: Any, as_lines: bool) -> bytes:
    return ("".join(json.dumps(row) + "\n" for row in value) if as_lines else json.dumps(value)).encode()


def check_shares(value: Any) -> None:
    """Figures are numbers that JSON can hold; accuracies are shares."""
    json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        for name, part in value.items():
            if name in ("accuracy", "f1", "precision", "recall", "share_of_yes") and part is not None:
                assert 0 <= part <= 100
            check_shares(part)


def run(good: Any, as_lines: bool, score: Callable[[str], Any], path: Path, seed: int) -> Counter[str]:
    """Scores the sound file, then damaged ones; counts what became of them."""
    path.write_bytes(dump(good, as_lines))
    check_shares(score(str(path)))
    outcomes: Counter[str] = Counter()
    for number in range(EACH):
        path.write_bytes(damaged(good, as_lines, random.Random(f"{seed}/{number}")))
        try:
            check_shares(score(str(path)))
        except DataError as error:
            outcomes["refused" if error.what and error.remedy else "without a reason"] += 1
        else:
            outcomes["accepted"] += 1
    assert outcomes["refused"] + outcomes["accepted"] == EACH
    assert outcomes["refused"] > EACH // 20
    return outcomes


_ANSWERS = ["The answer is A.", "B", "C. blue", "SOLUTION: x\n###\nANSWER: B.", "?", "A"]
TEXTS = {str(n): text for n, text in enumerate(_ANSWERS)}


def scienceqa_score(folder: Path) -> Callable[[str], Any]:
    problems = scienceqa.read_problems(str(folder / "problems.json"), str(folder / "pid_splits.json"), "test")

    def score(path: str) -> Any:
        predictions = read_predictions(path)
        found = scienceqa.score_predictions(problems, predictions, "test").figures
        both = scienceqa_ensemble.complement(problems, predictions, predictions)
        return [found, both, scienceqa_ensemble.judged(problems, predictions, predictions, predictions)]

    return score


@pytest.mark.parametrize("form", ["results", "lines", "plain"])
def test_predictions_of_scienceqa(tmp_path: Path, form: str) -> None:
    folder = make_scienceqa(tmp_path / "sqa")
    indices = {key: number % 4 - 1 for number, key in enumerate(TEXTS)}
    goods: dict[str, Any] = {
        "results": {"acc": 50.0, "correct": 3, "count": 6, "results": indices, "outputs": TEXTS},
        "lines": [{"question_id": key, "text": text, "prompt": "?"} for key, text in TEXTS.items()],
        "plain": TEXTS,
    }
    outcomes = run(goods[form], form == "lines", scienceqa_score(folder), tmp_path / "p.json", 1)
    assert outcomes["accepted"]


def test_problems_of_scienceqa(tmp_path: Path) -> None:
    folder = make_scienceqa(tmp_path / "sqa")
    good = json.loads((folder / "problems.json").read_text())

    def score(path: str) -> Any:
        problems = scienceqa.read_problems(path, str(folder / "pid_splits.json"), "test")
        [scienceqa.question_text(problem, "QCM-LEPA") for problem in problems]
        return scienceqa.figures_of(problems, {problem.problem_id: 0 for problem in problems})

    run(good, False, score, tmp_path / "problems.json", 2)


def test_reviews(tmp_path: Path) -> None:
    good = [
        {
            "question_id": n,
            "category": ("conv", "detail")[n % 2],
            "content": f"8 {n}\nWell.",
            "tuple": [8.0, n],
        }
        for n in range(6)
    ]
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(dump(good, True))

    def score(path: str) -> Any:
        alone = score_reviews({path: read_reviews(path)}, "original").figures
        return [alone, score_reviews({path: read_reviews(path, 1)}).figures]

    outcomes = run(good, True, score, tmp_path / "r.jsonl", 3)
    assert outcomes["accepted"]


def test_answers_to_pope(tmp_path: Path) -> None:
    folder = make_pope(tmp_path / "pope", 6)
    labels = {"random": pope.read_labels(str(folder / "coco_pope_random.json"))}
    good = [{"question_id": n + 1, "text": ("Yes.", "No")[n % 2]} for n in range(6)]

    def score(path: str) -> Any:
        answers = pope.match_answers(labels, read_rows(path, "--predictions"), path)
        return pope.score_answers(labels["random"], answers).figures

    outcomes = run(good, True, score, tmp_path / "a.jsonl", 4)
    assert outcomes["accepted"]


def test_rows_of_a_vqa_file(tmp_path: Path) -> None:
    good = [json.loads(line) for line in make_vqa(tmp_path / "vqa").read_text().splitlines()]

    def score(path: str) -> Any:
        questions, left_out = vqa.read_questions(path)
        return vqa.score_answers(questions, {q.question_id: "red" for q in questions}, left_out).figures

    outcomes = run(good, True, score, tmp_path / "vqa.jsonl", 5)
    assert outcomes["accepted"]


def test_rules_and_contexts(tmp_path: Path) -> None:
    folder = make_llava_bench(tmp_path / "bench")
    contexts = [json.loads(line) for line in (folder / "context.jsonl").read_text().splitlines()]
    contexts[0] |= {"captions": ["One.", "Two."], "instances": [{"category": "cup", "bbox": [0, 0, 1, 1]}]}
    read = run(contexts, True, lambda path: [c.text for c in read_contexts(path).values()], tmp_path / "c", 6)
    assert read["accepted"]
    rules = {"conv": {"role": "Assistant", "prompt": "Grade."}, "default": {"role": "A", "prompt": "B"}}
    run(rules, False, lambda path: [r.prompt for r in read_rules(path).values()], tmp_path / "rules", 7)
