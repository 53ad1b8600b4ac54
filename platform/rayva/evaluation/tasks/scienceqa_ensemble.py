"""ScienceQA with a second model (section 5.2): the complement, and the judge.

complement: the second model's answer, and the first's where the second's names no choice.
judge: where the two differ, the second model is asked again with both answers before it. Where that
names no choice either, the first's answer stands.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rayva.errors import DataError
from rayva.evaluation.predictions import Predictions, require_overlap
from rayva.evaluation.tasks.scienceqa import (
    Choices,
    Problem,
    figures_of,
    parse_outputs,
    question_text,
    stored_choices,
)

JUDGE_SYSTEM = "You check answers to school questions with care, and decide by what is right."
_JUDGE = (
    "{question}\n\nTwo students have answered this question.\n\nStudent 1:\n{first}\n\nStudent 2:\n{second}"
    "\n\nWork out the right answer yourself, with the help of what they wrote. "
    'End with one line of the form "The answer is X." where X is the letter of one option.'
)


def judge_prompt(problem: Problem, first: str, second: str) -> str:
    """What the judge is asked about one question on which two models differ."""
    question = question_text(problem, "QCM-LEA")
    return _JUDGE.format(question=question, first=first.strip(), second=second.strip())


def answer_of(problem: Problem, predictions: Predictions) -> str:
    """What a model has answered, in words also where its file has only indices; "" for nothing."""
    if predictions.outputs:
        return predictions.outputs.get(problem.problem_id, "")
    choice = choices_of([problem], predictions).get(problem.problem_id)
    return "" if choice is None else f"The answer is {problem.letter(choice)}."


def choices_of(problems: Sequence[Problem], predictions: Predictions) -> Choices:
    """Choices by rule, or the stored ones of a file without outputs."""
    parsed = parse_outputs(problems, predictions)
    return parsed if parsed is not None else stored_choices(problems, predictions) or {}


def disagreements(problems: Sequence[Problem], first: Predictions, second: Predictions) -> list[Problem]:
    """Questions on which the two do not choose the same."""
    ours, theirs = choices_of(problems, first), choices_of(problems, second)
    return [p for p in problems if ours.get(p.problem_id) != theirs.get(p.problem_id)]


def complement(
    problems: Sequence[Problem],
    first: Predictions,
    second: Predictions,
    known: Collection[str] | None = None,
) -> dict[str, Any]:
    """Figures of the complement, beside those of the second model and of agreement.

    Args:
        known: ids of all problems of the file, of any split.

    Raises:
        DataError: the second answers questions that are not known.
    """
    ours, theirs = _both(problems, first, second, known)
    choices = {key: theirs[key] if theirs[key] is not None else ours[key] for key in ours}
    agreement = _agreement(problems, ours, theirs)
    return {
        "kind": "complement",
        **figures_of(problems, choices),
        **_missing(problems, first, second),
        **agreement,
    }


def judged(
    problems: Sequence[Problem],
    first: Predictions,
    second: Predictions,
    verdicts: Predictions | None,
    known: Collection[str] | None = None,
) -> dict[str, Any]:
    """Figures of the judge, from its answers to the questions on which the two models differ.

    Without `verdicts` there is no figure yet: what the judge would have to decide is counted, with the
    accuracy of a judge that is always wrong, and of one that always picks a right answer if there is one.

    Args:
        known: ids of all problems of the file, of any split.

    Raises:
        DataError: the second, or the verdicts, answer questions that are not known.
    """
    ours, theirs = _both(problems, first, second, known)
    agreement = {**_missing(problems, first, second), **_agreement(problems, ours, theirs)}
    if verdicts is None:
        agree = {key: ours[key] if ours[key] == theirs[key] else None for key in ours}
        return {
            "kind": "judge",
            "accuracy": None,
            "lowest_accuracy": figures_of(problems, agree)["accuracy"],
            "note": f"{agreement['differ']} questions wait for a judge: give --judged FILE or --judge-url",
            **agreement,
        }
    require_overlap(verdicts, ours, "the split")
    decided = choices_of(problems, verdicts)
    choices: Choices = {}
    unanswered = unparsable = 0
    for key, choice in ours.items():
        choices[key] = choice
        if choice == theirs[key]:
            continue
        verdict = decided.get(key)
        if key not in verdicts.ids:
            unanswered += 1
        elif verdict is None:
            unparsable += 1
        else:
            choices[key] = verdict
    counts = {"judge_unanswered": unanswered, "judge_unparsable": unparsable}
    return {"kind": "judge", **figures_of(problems, choices), **counts, **agreement}


def require_second(
    problems: Sequence[Problem], second: Predictions, known: Collection[str] | None = None
) -> None:
    """Refuses a second model that has nothing to say about these problems.

    Raises:
        DataError: it answers questions that are not in `known`, or none of `problems`.
    """
    ids = {problem.problem_id for problem in problems}
    require_overlap(second, ids if known is None else known, "the file of problems")
    if ids.isdisjoint(second.ids):
        raise DataError(f"{second.path} answers no problem of the split", "check the split")


def _both(
    problems: Sequence[Problem], first: Predictions, second: Predictions, known: Collection[str] | None
) -> tuple[Choices, Choices]:
    ids = [problem.problem_id for problem in problems]
    require_overlap(second, ids if known is None else known, "the file of problems")
    ours, theirs = choices_of(problems, first), choices_of(problems, second)
    return {key: ours.get(key) for key in ids}, {key: theirs.get(key) for key in ids}


def _missing(problems: Sequence[Problem], first: Predictions, second: Predictions) -> dict[str, int]:
    """Problems that a model's file has no answer to; they also count as unparsable."""
    ids = {problem.problem_id for problem in problems}
    return {
        "first_missing": len(ids.difference(first.ids)),
        "second_missing": len(ids.difference(second.ids)),
        "second_not_in_split": len(set(second.ids) - ids),
    }


def _agreement(problems: Sequence[Problem], ours: Choices, theirs: Choices) -> dict[str, Any]:
    ids = [problem.problem_id for problem in problems]
    right = {problem.problem_id: problem.answer for problem in problems}
    either = {key: ours[key] if ours[key] == right[key] else theirs[key] for key in ids}
    return {
        "first": figures_of(problems, ours),
        "second": figures_of(problems, theirs),
        "differ": sum(ours[key] != theirs[key] for key in ids),
        "agree_and_right": sum(ours[key] == theirs[key] == right[key] for key in ids),
        "highest_accuracy": figures_of(problems, either)["accuracy"],
        "either_right": figures_of(problems, either)["correct"],
    }
