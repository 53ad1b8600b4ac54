"""Reviews of a judge, and the relative score of LLaVA-Bench: the candidate's points over the reference's.

A review whose first line holds no two numbers is a failure. It is counted and left out of the mean; the
original writes [-1, -1] and averages that in, which `compat="original"` reproduces, with the original's
narrower rule for what two numbers are.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayva.errors import DataError
from rayva.evaluation.reading import as_id, as_number, as_object, as_text, read_rows, shown
from rayva.evaluation.tasks.base import PRECISION, Result, Scored

FAILED = (-1.0, -1.0)
CANDIDATE_FIRST = "candidate_first"
_LARGEST = 1000.0
"""Scores go to 10, or perhaps to 100; a larger number is a mistake and no score."""
Compat = Literal["none", "original"]
_CATEGORIES = {1: "conv", 2: "detail", 3: "complex"}
_REMEDY = "give JSON Lines of reviews with `tuple` or `score` (two numbers); see docs/evaluate.md"


@dataclass(frozen=True, slots=True)
class Review:
    """One review: `scores` are those of the reference and of the candidate; `FAILED` where none were read."""

    question_id: str
    scores: tuple[float, float]
    category: str | None = None
    content: str = ""
    order: str = "reference_first"

    @property
    def failed(self) -> bool:
        return self.scores == FAILED


def parse_scores(content: str, compat: Compat = "none") -> tuple[float, float]:
    """The two scores in a review's first line, separated by space, a comma, or both.

    The original takes exactly one space or comma and nothing around the numbers, so that "8, 7" is a failure.

    `FAILED` where the line is anything else, or a number cannot be a score.
    """
    line = content.split("\n")[0].replace(",", " ")
    first = line.split(" ") if compat == "original" else line.split()
    if len(first) != 2:
        return FAILED
    try:
        scores = float(first[0]), float(first[1])
    except ValueError:
        return FAILED
    return scores if all(0 <= score <= _LARGEST for score in scores) else FAILED


def in_order(scores: tuple[float, float], swapped: bool) -> tuple[float, float]:
    """The scores as (reference, candidate), of a review that was shown the candidate first if `swapped`."""
    return scores[::-1] if swapped and scores != FAILED else scores


def read_reviews(path: str, candidate: Literal[1, 2] = 2, compat: Compat = "none") -> list[Review]:
    """The reviews of one run.

    Args:
        candidate: which of the two answers is the candidate's (2 in LLaVA's files, the reference being 1).
        compat: whose rule reads the scores of reviews that hold none, or that Rayva's judge has written.

    Raises:
        DataError: the file is missing, empty, cut, or holds something else than reviews.
    """
    reviews = []
    seen: set[tuple[str, str]] = set()
    for number, value in enumerate(read_rows(path, "--reviews"), 1):
        where = f"{path}: row {number}"
        review = _review(as_object(value, where), where, candidate, compat)
        key = (review.question_id, review.order)
        if key in seen:
            raise DataError(
                f"{path}: row {number} reviews question {review.question_id!r} again",
                "give each run's reviews as a file of its own: --reviews RUN1 RUN2 ...",
            )
        seen.add(key)
        reviews.append(review)
    if len({review.category is None for review in reviews}) > 1:
        raise DataError(f"{path}: some reviews have a category and others none", "do not mix files")
    return reviews


def _review(row: dict[str, Any], where: str, candidate: int, compat: Compat) -> Review:
    if "question_id" not in row:
        raise DataError(f"{where} has no question_id, so it is no review", _REMEDY)
    given = next((name for name in ("tuple", "score") if row.get(name) is not None), None)
    content = next((row[name] for name in ("content", "text") if row.get(name) is not None), "")
    content = as_text(content, f"{where}: content")
    if given is not None:
        scores = _pair(row[given], f"{where}: {given}")
        if compat == "original" and content and "judge" in row:  # our own file: the rule was ours
            scores = in_order(parse_scores(content, compat), row.get("order") == CANDIDATE_FIRST)
    elif content and ("content" in row or any(key.startswith("answer1") for key in row)):
        scores = parse_scores(content, compat)  # a row with `text` alone may as well be an answer
    else:
        raise DataError(f"{where} has neither tuple nor score, so it is no review", _REMEDY)
    category = row.get("category")
    if isinstance(category, int) and not isinstance(category, bool):
        category = _CATEGORIES.get(category, str(category))
    return Review(
        question_id=as_id(row["question_id"], f"{where}: question_id"),
        scores=scores if candidate == 2 or scores == FAILED else scores[::-1],
        category=None if category is None else as_text(category, f"{where}: category"),
        content=content,
        order=as_text(row.get("order", "reference_first"), f"{where}: order"),
    )


def _pair(value: object, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f"{where}: expected two scores, found {shown(value)}", _REMEDY)
    first, second = (as_number(part, where) for part in value)
    if max(first, second) > _LARGEST:
        raise DataError(f"{where}: {shown(value)} are no scores", _REMEDY)
    return (first, second) if first >= 0 and second >= 0 else FAILED


def score_reviews(
    runs: Mapping[str, Sequence[Review]], compat: Compat = "none", rows: Sequence[Scored] = ()
) -> Result:
    """The relative score of each run and their mean and spread, over all and by category.

    Args:
        runs: reviews of each run, by its name (the file's).
        rows: the questions with their answers, where they are known; for reports.

    Raises:
        DataError: the runs review different questions.
    """
    _check_same(runs)
    first = next(iter(runs.values()))
    categories = sorted({review.category for review in first if review.category is not None})
    each = {name: _run_figures(reviews, categories, compat) for name, reviews in runs.items()}
    failures = sum(review.failed for reviews in runs.values() for review in reviews)
    figures = {
        "task": "llava_bench",
        "runs": len(runs),
        "questions": len({review.question_id for review in first}),
        "reviews": sum(map(len, runs.values())),
        "parse_failures": failures,
        "compat": compat,
        **_over_runs([run["all"] for run in each.values()]),
        "by_category": {
            name: _over_runs([run["by_category"][name] for run in each.values()]) for name in categories
        },
        "each_run": each,
    }
    return Result(figures, _scored(runs, compat, {row.question_id: row for row in rows}))


def _check_same(runs: Mapping[str, Sequence[Review]]) -> None:
    """Runs over different questions have no mean."""
    asked = {
        name: Counter((r.question_id, r.category, r.order) for r in reviews) for name, reviews in runs.items()
    }
    (first, wanted), *others = asked.items()
    for name, found in others:
        if found != wanted:
            odd = sorted(str(key[0]) for key in (found - wanted) + (wanted - found))
            raise DataError(
                f"{first} and {name} review different questions: {len(odd)} are in only one of them, "
                f"or of another category there ({odd[0]!r})",
                "give runs of the same benchmark; a file may be cut",
            )


def _run_figures(reviews: Sequence[Review], categories: Sequence[str], compat: Compat) -> dict[str, Any]:
    groups = {name: [r for r in reviews if r.category == name] for name in categories}
    return {
        "all": _figures(reviews, compat),
        "by_category": {name: _figures(group, compat) for name, group in groups.items()},
    }


def _figures(reviews: Sequence[Review], compat: Compat) -> dict[str, Any]:
    used = [r.scores for r in reviews if compat == "original" or not r.failed]
    if not used:
        return {"relative_score": None, "reference": None, "candidate": None, "reviews": 0,
                "parse_failures": len(reviews)}  # fmt: skip
    reference = statistics.fmean(pair[0] for pair in used)
    candidate = statistics.fmean(pair[1] for pair in used)
    return {
        "relative_score": round(100 * candidate / reference, PRECISION) if reference else None,
        "reference": round(reference, PRECISION),
        "candidate": round(candidate, PRECISION),
        "reviews": len(used),
        "parse_failures": sum(review.failed for review in reviews),
    }


def _over_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (of the sample), lowest and highest of the runs' relative scores."""
    scores = [run["relative_score"] for run in runs if run["relative_score"] is not None]
    if not scores:
        return {"relative_score": None, "spread": None, "scores": []}
    spread = {
        "stdev": round(statistics.stdev(scores), PRECISION) if len(scores) > 1 else None,
        "lowest": min(scores),
        "highest": max(scores),
    }
    return {"relative_score": round(statistics.fmean(scores), PRECISION), "spread": spread, "scores": scores}


def _scored(runs: Mapping[str, Sequence[Review]], compat: Compat, rows: Mapping[str, Scored]) -> list[Scored]:
    """Each question with its points in each run; the two orders of a question are one pair of sums."""
    totals: dict[str, list[list[float]]] = {}
    categories: dict[str, str] = {}
    reviews_text: dict[str, str] = {}
    for number, reviews in enumerate(runs.values()):
        for review in reviews:
            sums = totals.setdefault(review.question_id, [[0.0, 0.0] for _ in runs])
            categories.setdefault(review.question_id, review.category or "all")
            reviews_text.setdefault(review.question_id, review.content)
            if compat == "original" or not review.failed:
                sums[number][0] += review.scores[1]
                sums[number][1] += review.scores[0]
    scored = []
    for question_id, sums in totals.items():
        known = rows.get(question_id)
        scored.append(
            Scored(
                question_id=question_id,
                question=known.question if known else f"question {question_id}",
                answer=known.answer if known else "",
                reference=known.reference if known else "",
                parts={"relative_score": [(pair[0], pair[1]) for pair in sums]},
                group=categories[question_id],
                picture=known.picture if known else None,
                note=reviews_text[question_id],
            )
        )
    return scored
