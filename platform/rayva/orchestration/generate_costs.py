"""What a run of instruction generation has cost, and what it may have cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayva.instruct.generator import Outcome
from rayva.instruct.teachers import Requests
from rayva.llm.cache import AnswerCache
from rayva.llm.prices import FREE, Price, Prices
from rayva.llm.request import ChatAnswer
from rayva.recipes.schema import Generation
from rayva.storage import Storage

if TYPE_CHECKING:
    from rayva.orchestration.generate_run import Plan


@dataclass(frozen=True)
class Costs:
    """Tokens and dollars of a run.

    Attributes:
        prompt_tokens, completion_tokens, cost: of its answers; one that two samples share counts once.
        lost_calls: calls that broke off and may be billed (cut, timed out, no JSON).
        cost_at_most: `cost`, and those calls with their longest answers. Both are None for an unknown price.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0
    lost_calls: int = 0
    cost_at_most: float | None = 0.0


def costs_of(plan: Plan, outcomes: Mapping[int, Outcome], price: Price | None) -> Costs:
    """The costs of all that was asked for `outcomes`, in this process or before."""
    if plan.settings.teacher == "symbolic":
        return Costs()
    paid = _paid(plan, outcomes)
    lost = _lost(plan)
    cost = None if price is None else sum(map(price.of_answer, paid))
    return Costs(
        prompt_tokens=sum(answer.prompt_tokens for answer in paid),
        completion_tokens=sum(answer.completion_tokens for answer in paid),
        cost=cost,
        lost_calls=len(lost),
        cost_at_most=None if price is None else sum(map(price.of_answer, (*paid, *lost))),
    )


def _paid(plan: Plan, outcomes: Mapping[int, Outcome]) -> list[ChatAnswer]:
    """Each answer once: samples about contexts that are alike have the same request."""
    requests = Requests(plan.settings, plan.prompts)
    by_digest = {
        requests.of(plan.tasks[number], tried).digest: attempt.answer
        for number, outcome in outcomes.items()
        for tried, attempt in enumerate(outcome.attempts)
    }
    return list(by_digest.values())


def _lost(plan: Plan) -> list[ChatAnswer]:
    """Calls of this run that broke off, at their worst case; the storage may hold those of others, too."""
    cache = AnswerCache(plan.storage)
    lost = cache.lost()
    cache.close()
    if not lost:
        return []
    requests = Requests(plan.settings, plan.prompts)
    attempts = range(plan.settings.attempts)
    own = {requests.of(task, attempt).digest for task in plan.tasks for attempt in attempts}
    return [answer for digest, answer in lost if digest in own]


def find_price(settings: Generation) -> Price | None:
    """The price of the teacher, None for one that is in no table.

    Raises:
        RecipeError: there is a limit on the cost, and the price is not known.
    """
    if settings.teacher == "symbolic" or settings.model is None:
        return FREE
    prices = Prices.load(settings.prices)
    if settings.max_cost is not None:
        return prices.require(settings.model, "--max-cost")
    return prices.find(settings.model)


def price_of(settings: Generation) -> Price:
    """Like `find_price`; without a limit on the cost an unknown price is none."""
    return find_price(settings) or FREE


def spent_at(storage: Storage, price: Price) -> float:
    """Dollars of all answers that are kept at a storage, and of calls that broke off at their worst case."""
    cache = AnswerCache(storage)
    spent = sum(price.of_answer(answer) for answer in cache.answers())
    cache.close()
    return spent


def told(summary: Mapping[str, Any]) -> str:
    """The dollars of a run's summary for people to read."""
    known = summary["cost"] is not None
    cost = f"${summary['cost']:.4f}" if known else "at a price that is not known (--prices FILE)"
    if not summary.get("lost_calls"):
        return cost
    most = f"at most ${summary['cost_at_most']:.4f}: " if known else ""
    calls = f"{summary['lost_calls']:,} call{'s' if summary['lost_calls'] != 1 else ''}"
    return f"{cost} ({most}{calls} broke off and may be billed)"
