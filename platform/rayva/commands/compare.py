"""Compares evaluations question by question: figures side by side, and what the differences are worth.

A run is the --out of pipelines/evaluate.py, or the storage root of pipelines/full.py. Differences are to the
first run, with bootstrap intervals over the questions that all runs have.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rayva.errors import DataError
from rayva.evaluation.comparison import DEFAULT_RESAMPLES, Comparison, as_json, as_text, compare
from rayva.evaluation.comparison_report import load_pictures, render
from rayva.evaluation.records import read_run
from rayva.progress import say
from rayva.storage import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="NAME=FOLDER gives a run another name")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the report there, with pictures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--examples", type=int, default=24, help="questions shown a task (default: 24)")
    parser.add_argument("--resamples", type=int, default=DEFAULT_RESAMPLES, help="default: %(default)s")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--tracking-uri", metavar="URI", help="log figures and report to this MLflow store")
    parser.add_argument("--experiment", default="rayva-compare", help="MLflow experiment")


def run(options: argparse.Namespace) -> int:
    """Prints the comparison; writes and logs the report where that is asked for."""
    _check(options)
    records = []
    for reference in options.runs:
        name, separator, folder = reference.partition("=")
        named = separator and "/" not in name
        records.append(read_run(folder if named else reference, name if named else None))
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        raise DataError(f"two runs are called {max(names, key=names.count)!r}", "name them: NAME=FOLDER")
    comparison = compare(
        records,
        resamples=options.resamples,
        seed=options.seed,
        level=options.level,
        examples=options.examples,
    )
    if not comparison.figures:
        raise DataError(
            "the runs share no scored question: "
            + "; ".join(f"{record.name} has {', '.join(record.tasks)}" for record in records),
            "give evaluations of the same tasks",
        )
    print(json.dumps(as_json(comparison), indent=1) if options.json else as_text(comparison))
    if options.html is not None or options.tracking_uri is not None:
        _report(comparison, options)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not 0 < options.level < 1 or options.resamples < 1 or options.examples < 0:
        raise DataError(
            "--level must be between 0 and 1, --resamples at least 1, --examples not negative", "correct it"
        )


def _report(comparison: Comparison, options: argparse.Namespace) -> None:
    page = render(comparison, load_pictures(comparison)).encode(errors="backslashreplace")
    if options.html is not None:
        path: Path = options.html.absolute()
        Storage(str(path.parent)).write_bytes(path.name, page)
        say(f"report: {path}")
    if options.tracking_uri is not None:
        from rayva.tracking.reports import log_report

        with tempfile.TemporaryDirectory() as folder:
            storage = Storage(folder)
            storage.write_bytes("report.html", page)
            storage.write_json("comparison.json", as_json(comparison))
            shown = log_report(
                storage, options.tracking_uri, options.experiment,
                " / ".join(record.name for record in comparison.runs),
                params=_params(comparison), metrics=flat_metrics(comparison),
                artifacts=["report.html", "comparison.json"],
            )  # fmt: skip
        say(f"logged to {shown}")


def _params(comparison: Comparison) -> dict[str, Any]:
    runs = {f"run.{record.name}": record.folder for record in comparison.runs}
    return {**runs, "level": comparison.level, "resamples": comparison.resamples, "seed": comparison.seed}


def flat_metrics(comparison: Comparison) -> dict[str, float]:
    """Every figure and difference with its interval, by name."""
    metrics: dict[str, float] = {}
    first = comparison.runs[0].name
    for figure in comparison.figures:
        place = "/".join(part for part in (figure.task, figure.group, figure.name) if part)
        for record, value, difference in zip(comparison.runs, figure.values, figure.differences, strict=True):
            named = {f"{record.name}/{place}": value, f"{record.name} - {first}/{place}": difference}
            for name, estimate in named.items():
                if estimate is not None and estimate.value is not None:
                    metrics[name] = estimate.value
                    metrics |= {f"{name}/low": estimate.low or 0.0, f"{name}/high": estimate.high or 0.0}
    return metrics
