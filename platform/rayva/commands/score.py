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

from rayva.errors import DataError
from rayva.evaluation.predictions import Predictions, read_predictions, require_overlap
from rayva.evaluation.reading import as_id, as_object, as_text, read_document, read_rows
from rayva.evaluation.reviews import read_reviews, score_reviews
from rayva.evaluation.tasks import pope, scienceqa, scienceqa_ensemble, vqa
from rayva.progress import say
from rayva.storage import Storage

SUBCOMMANDS = True


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
    parser.add_argument("--splits", metavar="FILE", help="pid_splits.json; default: all problems")
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
    parser.add_argument("--judge-model", metavar="NAME")
    parser.add_argument(
        "--judge-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable of its key"
    )
    parser.add_argument("--judge-temperature", type=float, default=0.0, help="default: 0")
    parser.add_argument(
        "--judge-out", metavar="FOLDER", help="keeps its answers; asked again, nothing is paid twice"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the figures as JSON on stdout; what deserves a warning goes to stderr."""
    score = {"scienceqa": _scienceqa, "llava-bench": _llava_bench, "pope": _pope, "vqa": _vqa}
    figures = score[options.task](options)
    if figures.get("missing"):
        say(f"warning: {figures['missing']} of {figures['questions']} questions have no answer in the file")
    print(json.dumps(figures, indent=1, allow_nan=False))
    return 0


def _scienceqa(options: argparse.Namespace) -> dict[str, Any]:
    if (options.second is None) != (options.ensemble is None):
        raise DataError("an ensemble takes two models", "give --second FILE and --ensemble together")
    if options.judged is not None and options.ensemble != "judge":
        raise DataError("--judged holds a judge's answers", "give --ensemble judge too")
    problems = scienceqa.read_problems(options.problems, options.splits, options.split)
    known = as_object(read_document(options.problems, "--problems"), options.problems)
    first = read_predictions(options.predictions)
    figures = scienceqa.score_predictions(problems, first, options.split, known).figures
    if options.second is None:
        return figures
    second = read_predictions(options.second, "--second")
    if options.ensemble == "complement":
        return figures | {"ensemble": scienceqa_ensemble.complement(problems, first, second)}
    verdicts = read_predictions(options.judged, "--judged") if options.judged else None
    if options.judge_url is not None:
        verdicts = _verdicts(options, problems, first, second)
    return figures | {"ensemble": scienceqa_ensemble.judged(problems, first, second, verdicts)}


def _verdicts(
    options: argparse.Namespace,
    problems: list[scienceqa.Problem],
    first: Predictions,
    second: Predictions,
) -> Predictions:
    """Asks the judge where the two models differ."""
    if options.judge_model is None or options.judge_out is None:
        raise DataError("a judge takes more", "give --judge-url, --judge-model and --judge-out together")
    from rayva.evaluation.chat import ChatModel, endpoint
    from rayva.evaluation.judge import Judge, decide

    place = endpoint(options.judge_url, options.judge_key_env, concurrency=8)
    judge = Judge(ChatModel(options.judge_model, place), options.judge_temperature)
    return decide(problems, first, second, judge, Storage(options.judge_out), "scienceqa")


def _llava_bench(options: argparse.Namespace) -> dict[str, Any]:
    runs = {path: read_reviews(path, options.candidate) for path in options.reviews}
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
