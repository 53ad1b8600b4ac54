"""From a task to a sample: asks the teacher, reads and checks the answer, and asks again if it is no good."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rayva.instruct.parse import Pair, Rejected, detail_question, parse
from rayva.instruct.rules import Duplicates, find_fault, is_refusal
from rayva.instruct.tasks import Task
from rayva.instruct.teachers import NotAnsweredYet, Teacher
from rayva.llm.client import BudgetSpent
from rayva.llm.request import ChatAnswer, LLMError, PermanentError

Status = Literal["accepted", "rejected", "failed", "stopped", "waiting"]
"""`failed`: the endpoint gave no answer; `stopped`: the budget is spent; `waiting`: for a batch."""


@dataclass(frozen=True)
class Attempt:
    """One answer of the teacher, and why it was rejected; an empty reason is an accepted one."""

    answer: ChatAnswer
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    status: Status
    pairs: tuple[Pair, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    error: str = ""


@dataclass
class Generator:
    """Writes samples with one teacher; knows what it has accepted, so that nothing comes twice.

    Args:
        attempts: how often a task is asked while its answers are rejected.
        seed: chooses the questions that detailed descriptions answer.
    """

    teacher: Teacher
    attempts: int
    seed: int
    duplicates: Duplicates = field(default_factory=Duplicates)

    async def generate(self, task: Task) -> Outcome:
        """Carries out a task.

        Raises:
            PermanentError: a fatal one, which every other task would meet as well.
            StorageError: the answers cannot be kept.
        """
        tried: list[Attempt] = []
        for number in range(self.attempts):
            try:
                answer = await self.teacher.answer(task, number)
            except BudgetSpent as error:
                return Outcome("stopped", (), tuple(tried), str(error))
            except NotAnsweredYet as error:
                return Outcome("waiting", (), tuple(tried), str(error))
            except LLMError as error:
                if isinstance(error, PermanentError) and error.fatal:
                    raise
                return Outcome("failed", (), tuple(tried), str(error))
            pairs, attempt = judge(task, answer, self.seed)
            if not attempt.reason and not self.duplicates.add(list(pairs), task.context.image):
                attempt = Attempt(answer, "duplicate")
            tried.append(attempt)
            if not attempt.reason:
                return Outcome("accepted", pairs, tuple(tried))
        return Outcome("rejected", (), tuple(tried))


def judge(task: Task, answer: ChatAnswer, seed: int) -> tuple[tuple[Pair, ...], Attempt]:
    """Reads and checks one answer: its questions with their answers, none if it is rejected."""
    try:
        pairs = parse(task.kind, answer.text, answer.finish_reason)
    except Rejected as error:
        # Who refuses keeps no format: the refusal is what went wrong.
        refused = error.reason == "missing_separator" and is_refusal(answer.text)
        return (), Attempt(answer, "refuses" if refused else error.reason, error.detail)
    if task.kind == "detail":
        question = detail_question(task.context.id, seed + task.repeat)
        pairs = [Pair(question, pair.answer) for pair in pairs]
    if fault := find_fault(task.kind, pairs, task.context):
        return (), Attempt(answer, *fault)
    return tuple(pairs), Attempt(answer)
