"""Scores files of predictions or of reviews, without a model, and prints JSON.

rayva score scienceqa --problems P --splits S --predictions F [--second G --ensemble complement|judge]
rayva score llava-bench --reviews RUN1.jsonl RUN2.jsonl ...
rayva score pope --labels coco_pope_random.json ... --predictions F
rayva score vqa --data LLAVA.json --predictions F
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rayva.errors import DataError, RecipeError
from rayva.evaluation.predictions import Predictions, read_predictions, require_overlap
from rayva.evaluation.reading import as_id, as_object, as_text, read_document, read_rows
from rayva.evaluation.reviews import read_reviews, score_reviews
from rayva.evaluation.tasks import pope, scienceqa, scienceqa_ensemble, vqa
from rayva.progress import say
from rayva.storage import Storage

SUBCOMMANDS = True

_JUDGE_KEY_ENV = "OPENAI_API_KEY"
_JUDGE_OPTIONS = {
    "--judge-url": "judge_url",
    "--judge-model": "judge_model",
    "--judge-out": "judge_out",
    "--judge-key-env": "judge_key_env",
    "--judge-temperature": "judge_temperature",
}
_NEEDED = ("--judge-model", "--judge-out")
"""What a judge that is asked now cannot do without."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    _scienceqa_arguments(kinds.add_parser("scienceqa", help="accuracy, from outputs and stored indices"))
    reviews = kinds.add_parser("llava-bench", help="relative score of a judge's reviews")
    reviews.add_argument("--reviews", nargs="+", required=True, metavar="FILE", help="one file a run")
    reviews.add_argument(
        "--compat", choices=("none", "original"), default="none",
        help="original: a review that cannot be read counts as -1 for both, as LLaVA's script has it",
    )  # fmt: skip
    reviews.add_argument(
        "--candidate", type=int, choices=(1, 2), default=2,
        help="which answer is the candidate's (default: 2; the reference is 1 in LLaVA's files)",
    )  # fmt: skip
    yes_no = kinds.add_parser("pope", help="accuracy, precision, recall, F1 and share of yes")
    yes_no.add_argument("--labels", nargs="+", required=True, metavar="FILE", help="coco_pope_*.json")
    yes_no.add_argument("--predictions", required=True, metavar="FILE")
    yes_no.add_argument(
        "--questions", metavar="FILE", help="{question_id, category} a line, for answers without a category"
    )
    words = kinds.add_parser("vqa", help="exact match of short answers")
    words.add_argument("--data", required=True, metavar="FILE", help="LLaVA JSON with the references")
    words.add_argument("--predictions", required=True, metavar="FILE")
    words.add_argument("--first-only", action="store_true", help="only the first question of each row")


def _scienceqa_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", required=True, metavar="FILE", help="problems.json")
    parser.add_argument("--splits", metavar="FILE", help="pid_splits.json; default: what the problems say")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--predictions", required=True, metavar="FILE")
    parser.add_argument("--second", metavar="FILE", help="predictions of a second model")
    parser.add_argument("--ensemble", choices=("complement", "judge"), help="with --second")
    parser.add_argument(
        "--judged", metavar="FILE", help="the judge's answers where the two models differ, for judge"
    )
    _judge_arguments(parser)


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge-url", metavar="URL", help="ask a judge now, at this endpoint")
    parser.add_argument("--judge-model", metavar="NAME", help="its model: pin an exact version")
    parser.add_argument(
        "--judge-key-env", metavar="NAME", help=f"variable of its key (default: {_JUDGE_KEY_ENV})"
    )
    parser.add_argument("--judge-temperature", type=float, metavar="T", help="default: 0")
    parser.add_argument(
        "--judge-out", metavar="FOLDER", help="keeps its answers; asked again, nothing is paid twice"
    )


def _check_ensemble(options: argparse.Namespace) -> None:
    """Options of an ensemble that lack one another, before any file is read or any judge is asked."""
    if (options.second is None) != (options.ensemble is None):
        raise RecipeError("an ensemble takes two models", "give --second FILE and --ensemble together")
    asked = {flag: getattr(options, name) for flag, name in _JUDGE_OPTIONS.items()}
    given = [flag for flag, value in asked.items() if value is not None]
    if options.ensemble != "judge":
        if given or options.judged is not None:
            flag = "--judged" if options.judged is not None else given[0]
            raise RecipeError(f"{flag} is for a judge", "give --second FILE --ensemble judge too")
        return
    if options.judged is not None and given:
        raise RecipeError(
            f"--judged holds the answers of a judge that was asked before, {given[0]} asks one now",
            "leave one of them out",
        )
    if options.judged is None and options.judge_url is None:
        if given:
            raise RecipeError(f"{given[0]} is for a judge that is asked now", "give --judge-url too")
        return  # what the judge would have to decide is told
    if options.judged is None and (lacking := [f for f in _NEEDED if asked[f] is None]):
        raise RecipeError(f"--judge-url needs {' and '.join(lacking)}", f"give {' and '.join(lacking)} too")


def run(options: argparse.Namespace) -> int:
    """Prints the figures as JSON on stdout; what deserves a warning goes to stderr."""
    score = {"scienceqa": _scienceqa, "llava-bench": _llava_bench, "pope": _pope, "vqa": _vqa}
    figures = score[options.task](options)
    if figures.get("missing"):
        say(f"warning: {figures['missing']} of {figures['questions']} questions have no answer in the file")
    if second := figures.get("ensemble", {}).get("second_missing"):
        say(f"warning: {second} of {figures['questions']} questions have no answer in the file of --second")
    print(json.dumps(figures, indent=1, allow_nan=False))
    return 0


def _scienceqa(options: argparse.Namespace) -> dict[str, Any]:
    _check_ensemble(options)
    problems = scienceqa.read_problems(options.problems, options.splits, options.split)
    known = as_object(read_document(options.problems, "--problems"), options.problems)
    first = read_predictions(options.predictions)
    figures = scienceqa.score_predictions(problems, first, options.split, known).figures
    if options.second is None:
        return figures
    second = read_predictions(options.second, "--second")
    scienceqa_ensemble.require_second(problems, second, known)
    if options.ensemble == "complement":
        return figures | {"ensemble": scienceqa_ensemble.complement(problems, first, second, known)}
    verdicts = None
    if options.judged is not None:
        verdicts = read_predictions(options.judged, "--judged")
    elif options.judge_url is not None:
        verdicts = _verdicts(options, problems, first, second)
    return figures | {"ensemble": scienceqa_ensemble.judged(problems, first, second, verdicts, known)}


def _verdicts(
    options: argparse.Namespace,
    problems: list[scienceqa.Problem],
    first: Predictions,
    second: Predictions,
) -> Predictions:
    """Asks the judge where the two models differ."""
    from rayva.evaluation.chat import ChatModel, endpoint
    from rayva.evaluation.judge import Judge, decide

    place = endpoint(options.judge_url, options.judge_key_env or _JUDGE_KEY_ENV, concurrency=8)
    judge = Judge(ChatModel(options.judge_model, place), options.judge_temperature or 0.0)
    return decide(problems, first, second, judge, Storage(options.judge_out), "scienceqa")


def _llava_bench(options: argparse.Namespace) -> dict[str, Any]:
    runs = {path: read_reviews(path, options.candidate, options.compat) for path in options.reviews}
    if len(runs) < len(options.reviews):
        raise DataError("a file of reviews is given twice", "name each run once")
    return score_reviews(runs, options.compat).figures


def _pope(options: argparse.Namespace) -> dict[str, Any]:
    labels: dict[str, list[pope.PopeQuestion]] = {}
    for path in options.labels:
        questions = pope.read_labels(path)
        if questions[0].category in labels:
            raise DataError(f"{path}: its category is given twice", "name each label file once")
        labels[questions[0].category] = questions
    rows = read_rows(options.predictions, "--predictions")
    if options.questions is not None:
        rows = _with_categories(rows, options.predictions, options.questions)
    answers = pope.match_answers(labels, rows, options.predictions)
    return pope.score_answers([q for group in labels.values() for q in group], answers).figures


def _with_categories(rows: list[Any], path: str, questions: str) -> list[Any]:
    """Rows of answers with the category that the file of questions has for their id."""
    categories = {}
    for number, value in enumerate(read_rows(questions, "--questions"), 1):
        where = f"{questions}: row {number}"
        row = as_object(value, where)
        key = as_id(row.get("question_id"), f"{where}: question_id")
        categories[key] = as_text(row.get("category"), f"{where}: category")
    found = []
    for number, value in enumerate(rows, 1):
        row = as_object(value, f"{path}: row {number}")
        key = as_id(row.get("question_id"), f"{path}: row {number}: question_id")
        if key not in categories:
            raise DataError(f"{path}: row {number} answers {key!r}; {questions} lacks it", "check the files")
        found.append({**row, "category": categories[key]})
    return found


def _vqa(options: argparse.Namespace) -> dict[str, Any]:
    questions, left_out = vqa.read_questions(options.data, options.first_only)
    predictions: Predictions = read_predictions(options.predictions)
    require_overlap(predictions, (question.question_id for question in questions), options.data)
    return vqa.score_answers(questions, predictions.outputs, left_out).figures
