"""The judge: asks a model to grade answers, and keeps all that a score can be recomputed from.

Each review is a row as the original writes it ({question_id, category, content, tuple}), with the judge's
model, temperature, the prompt's digest, the run, and the order in which the answers were shown. `tuple` is
always (reference, candidate), whatever the order was. `rayva score llava-bench` reads these files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayva.evaluation.chat import ChatModel
from rayva.evaluation.predictions import Predictions
from rayva.evaluation.records import lines
from rayva.evaluation.reviews import (
    CANDIDATE_FIRST,
    Compat,
    in_order,
    parse_scores,
    read_reviews,
    score_reviews,
)
from rayva.evaluation.rules import SYSTEM
from rayva.evaluation.tasks.base import Result, Scored
from rayva.evaluation.tasks.llava_bench import LlavaBench, ReviewRequest
from rayva.evaluation.tasks.scienceqa import Problem
from rayva.evaluation.tasks.scienceqa_ensemble import JUDGE_SYSTEM, answer_of, disagreements, judge_prompt
from rayva.llm.cache import AnswerCache
from rayva.llm.request import ChatAnswer, ChatRequest, Sampling
from rayva.progress import Progress, say
from rayva.storage import Storage

_KEPT = "judge"
_FAILED = "judge-failed.json"
"""Why calls have no answer, by their digest."""


@dataclass(frozen=True)
class Judge:
    """A judge and how it is asked; several runs differ in nothing but the draw."""

    model: ChatModel
    temperature: float = 0.2
    max_tokens: int = 1024
    runs: int = 1
    order: str = "reference_first"

    def describe(self) -> dict[str, Any]:
        """JSON data for records."""
        return {
            **self.model.describe(), "temperature": self.temperature, "max_tokens": self.max_tokens,
            "runs": self.runs, "order": self.order,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A review that is wanted: the request and the run it is for."""

    request: ReviewRequest
    run: int
    call: ChatRequest


def review(
    task: LlavaBench, answers: Mapping[str, str], judge: Judge, storage: Storage, compat: Compat = "none"
) -> Result:
    """Reviews of all answers in all runs, and the scores made of them.

    Reviews are written to `llava_bench/reviews-RUN.jsonl`. What the judge has answered is kept by the digest
    of model, sampling, prompt and run, and is not asked again.

    Raises:
        ServingError: the judge cannot be asked; what it has answered is kept.
    """
    requests = task.requests(answers, judge.order)
    wanted = [
        _Wanted(request, run, _call(request, run, judge))
        for run in range(1, judge.runs + 1)
        for request in requests
    ]
    replies = _ask(judge.model, [one.call for one in wanted], storage, task.name)
    paths = []
    for run in range(1, judge.runs + 1):
        rows = [_row(one, replies[one.call.digest], judge) for one in wanted if one.run == run]
        paths.append(f"{task.name}/reviews-{run}.jsonl")
        storage.write_bytes(paths[-1], lines(rows))
    known: list[Scored] = list(task.rows(answers))
    runs = {path: read_reviews(storage.uri(path), compat=compat) for path in paths} if requests else {}
    if not runs:
        return task.score([], answers)
    result = score_reviews(runs, compat, known)
    result.figures["judge"] = judge.describe()
    result.figures["judge_could_not_be_asked"] = sum(isinstance(reply, str) for reply in replies.values())
    return result


def _call(request: ReviewRequest, run: int, judge: Judge) -> ChatRequest:
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": request.prompt})
    sampling = Sampling(temperature=judge.temperature, max_tokens=judge.max_tokens)
    return ChatRequest(judge.model.model, messages, sampling, attempt=run - 1)


def decide(
    problems: Sequence[Problem],
    first: Predictions,
    second: Predictions,
    judge: Judge,
    storage: Storage,
    folder: str,
) -> Predictions:
    """Asks the judge about the ScienceQA questions on which two models differ.

    Its answers are written to `folder`/judged.jsonl, which `rayva score scienceqa --judged` reads.

    Raises:
        ServingError: the judge cannot be asked; what it has answered is kept.
    """
    sampling = Sampling(temperature=judge.temperature, max_tokens=judge.max_tokens)
    calls = {}
    for problem in disagreements(problems, first, second):
        said = [answer_of(problem, given) for given in (first, second)]
        system = {"role": "system", "content": JUDGE_SYSTEM}
        user = {"role": "user", "content": judge_prompt(problem, *said)}
        calls[problem.problem_id] = ChatRequest(judge.model.model, (system, user), sampling)
    replies = _ask(judge.model, list(calls.values()), storage, folder)
    rows = [
        {
            "question_id": problem_id,
            "text": reply.text,
            "judge": judge.model.model,
            "answered_by": reply.model,
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            "prompt_digest": call.prompt_digest,
        }
        for problem_id, call in calls.items()
        if not isinstance(reply := replies[call.digest], str)
    ]
    storage.write_bytes(f"{folder}/judged.jsonl", lines(rows))
    return Predictions(f"{folder}/judged.jsonl", {str(row["question_id"]): str(row["text"]) for row in rows})


def _ask(
    model: ChatModel, calls: Sequence[ChatRequest], storage: Storage, folder: str
) -> dict[str, ChatAnswer | str]:
    """Answers, or the reason why there is none, by the call's digest; kept ones are not asked for again."""
    cache, failed = AnswerCache(storage, f"{folder}/{_KEPT}"), f"{folder}/{_FAILED}"
    replies: dict[str, ChatAnswer | str] = {}
    for call in calls:
        known = cache.get(call)
        if known is not None:
            replies[call.digest] = known
    todo = {call.digest: call for call in calls if call.digest not in replies}
    with Progress(f"judge {model.model}", len(replies) + len(todo), "reviews", done=len(replies)) as progress:

        def told(call: ChatRequest, reply: ChatAnswer | str) -> None:
            replies[call.digest] = reply
            progress.advance()

        doubtful = storage.read_json(failed) if storage.exists(failed) else {}
        model.ask_all(todo.values(), told, cache, doubtful)
    errors = {key: reply for key, reply in replies.items() if isinstance(reply, str)}
    if errors or doubtful:
        storage.write_json(failed, errors)
    if errors:
        why = next(iter(errors.values()))
        say(f"warning: the judge could not be asked {len(errors)} of {len(replies)} questions; {why}")
    return replies


def _row(one: _Wanted, reply: ChatAnswer | str, judge: Judge) -> dict[str, Any]:
    request = one.request
    text = "" if isinstance(reply, str) else reply.text
    scores = in_order(parse_scores(text), request.swapped)
    record = {
        "question_id": request.question_id,
        "category": request.category,
        "content": text,
        "tuple": list(scores),
        "order": CANDIDATE_FIRST if request.swapped else "reference_first",
        "run": one.run,
        "judge": judge.model.model,
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "prompt_digest": one.call.prompt_digest,
    }
    if isinstance(reply, str):
        return record | {"error": reply}
    return record | {
        "answered_by": reply.model,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
