"""Evaluations side by side: figures with intervals, paired differences, and questions where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayva.evaluation.bootstrap import Estimate, Parts, interval, resampled

DEFAULT_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What one run has of one task: its figures, and the rows of `rayva.evaluation.tasks.base.Scored`."""

    figures: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    """By question id."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One evaluation; `folder` is where its pictures are."""

    name: str
    folder: str
    about: Mapping[str, Any]
    tasks: Mapping[str, TaskRecord]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a task in every run, and the difference of each run to the first (None for that)."""

    task: str
    name: str
    group: str
    questions: int
    values: tuple[Estimate, ...]
    differences: tuple[Estimate | None, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its row in every run."""

    task: str
    question_id: str
    rows: tuple[Mapping[str, Any], ...]
    points: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it, in the runs' order."""

    runs: tuple[RunRecord, ...]
    figures: tuple[Figure, ...]
    examples: tuple[Example, ...]
    level: float
    resamples: int
    seed: int


def compare(
    runs: Sequence[RunRecord],
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    examples: int = 24,
) -> Comparison:
    """Compares runs on the questions that all of them have, task by task.

    Tasks that some run lacks, and questions that some run lacks, take no part; figures tell their number.
    """
    shared = [task for task in runs[0].tasks if all(task in run.tasks for run in runs)]
    figures: list[Figure] = []
    shown: list[Example] = []
    for task in shared:
        records = [run.tasks[task] for run in runs]
        ids = [key for key in records[0].rows if all(key in record.rows for record in records)]
        figures += _figures(task, records, ids, resamples, seed, level)
        shown += _examples(task, records, ids, examples)
    return Comparison(tuple(runs), tuple(figures), tuple(shown), level, resamples, seed)


def _figures(
    task: str, records: Sequence[TaskRecord], ids: Sequence[str], resamples: int, seed: int, level: float
) -> list[Figure]:
    names = [name for name in _figure_names(records[0], ids) if all(_has(r, ids, name) for r in records)]
    groups: dict[str, list[str]] = {"": list(ids)}
    for key in ids:
        groups.setdefault(str(records[0].rows[key].get("group") or ""), []).append(key)
    groups[""] = list(ids)
    if len(groups) == 2:  # all of one group: nothing new
        groups = {"": list(ids)}
    return [
        _figure(task, name, group, records, members, resamples, seed, level)
        for group, members in groups.items()
        for name in (names if group == "" else names[:1])
        if members
    ]


def _figure_names(record: TaskRecord, ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for key in ids for name in record.rows[key]["parts"]))


def _has(record: TaskRecord, ids: Sequence[str], name: str) -> bool:
    return any(name in record.rows[key]["parts"] for key in ids)


def _figure(
    task: str,
    name: str,
    group: str,
    records: Sequence[TaskRecord],
    ids: Sequence[str],
    resamples: int,
    seed: int,
    level: float,
) -> Figure:
    parts = [parts_of(record.rows, ids, name) for record in records]
    values = [100 * part.figure() for part in parts]
    samples = [100 * column_S for column_S in resampled(parts, resamples, seed)]
    differences: list[Estimate | None] = [None]
    for value, samples_S in zip(values[1:], samples[1:], strict=True):
        differences.append(interval(value - values[0], samples_S - samples[0], level))
    estimates = tuple(interval(v, s, level) for v, s in zip(values, samples, strict=True))
    return Figure(task, name, group, len(ids), estimates, tuple(differences))


def parts_of(rows: Mapping[str, Mapping[str, Any]], ids: Sequence[str], name: str) -> Parts:
    """Numerators and denominators of a figure; a question without it has zeros, and takes no part."""
    runs = max((len(rows[key]["parts"].get(name, ())) for key in ids), default=1) or 1
    table_NR2 = np.zeros((len(ids), runs, 2))
    for index, key in enumerate(ids):
        pairs = rows[key]["parts"].get(name, ())
        if pairs:
            table_NR2[index, : len(pairs)] = pairs
    return Parts(table_NR2[:, :, 0].T, table_NR2[:, :, 1].T)


def _examples(task: str, records: Sequence[TaskRecord], ids: Sequence[str], count: int) -> list[Example]:
    """Questions where the runs differ most, taken in turn from those that each run is best at.

    With a single run, the first by digest: a fair draw.
    """
    name = next(iter(_figure_names(records[0], ids)), None)
    made = [_example(task, key, records, name) for key in ids]
    made.sort(key=lambda example: hashlib.sha256(example.question_id.encode()).digest())
    if len(records) == 1:
        return made[:count]
    queues: dict[int, list[Example]] = {}
    for example in made:
        points = [point for point in example.points if point is not None]
        if len(points) == len(records) and max(points) > min(points):
            queues.setdefault(example.points.index(max(points)), []).append(example)
    for queue in queues.values():
        queue.sort(key=lambda example: -_spread(example))
    chosen: list[Example] = []
    while len(chosen) < count and any(queues.values()):
        chosen += [queue.pop(0) for queue in queues.values() if queue]
    return chosen[:count]


def _spread(example: Example) -> float:
    points = [point for point in example.points if point is not None]
    return max(points) - min(points)


def _example(task: str, key: str, records: Sequence[TaskRecord], name: str | None) -> Example:
    rows = tuple(record.rows[key] for record in records)
    return Example(task, key, rows, tuple(_points(row, name) for row in rows))


def _points(row: Mapping[str, Any], name: str | None) -> float | None:
    """The question's own figure: the ratio of its sums."""
    pairs = row["parts"].get(name, ()) if name else ()
    under = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / under if under else None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON data."""
    return {
        "runs": [{"name": run.name, "folder": run.folder, **run.about} for run in comparison.runs],
        "level": comparison.level,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "figures": [
            {
                "task": figure.task,
                "figure": figure.name,
                "group": figure.group or "all",
                "questions": figure.questions,
                "values": [_estimate(value) for value in figure.values],
                "differences": [None if d is None else _estimate(d) for d in figure.differences],
            }
            for figure in comparison.figures
        ],
        "differ": [
            {
                "task": example.task,
                "question_id": example.question_id,
                "question": example.rows[0]["question"],
                "reference": example.rows[0]["reference"],
                "answers": [row["answer"] for row in example.rows],
                "points": list(example.points),
            }
            for example in (comparison.examples if len(comparison.runs) > 1 else ())
        ],
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    rounded = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if value is None else round(value, 4) for name, value in rounded.items()}


def as_text(comparison: Comparison) -> str:
    """The figures as a table for a terminal."""
    names = [run.name for run in comparison.runs]
    head = ["task", "figure", "of", "n", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    rows = [head]
    for figure in comparison.figures:
        cells = [shown(value) for value in figure.values]
        cells += [shown(d, sign=True) for d in figure.differences[1:] if d is not None]
        rows.append([figure.task, figure.name, figure.group or "all", str(figure.questions), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    note = f"{comparison.level:.0%} intervals of {comparison.resamples} paired resamples; * excludes zero"
    return "\n".join([*(line.rstrip() for line in lines), note])


def shown(estimate: Estimate, sign: bool = False) -> str:
    """An estimate for people: value [low, high], with a star where a difference's interval excludes zero."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    plus = "+" if sign else ""
    text = f"{estimate.value:{plus}.2f} [{estimate.low:{plus}.2f}, {estimate.high:{plus}.2f}]"
    return f"{text} *" if sign and (estimate.low > 0 or estimate.high < 0) else text
