"""What a run says that it has cost: each answer once, and calls that broke off apart."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import DataError, RecipeError
from rayva.instruct.teachers import Requests
from rayva.llm.cache import AnswerCache
from rayva.llm.prices import FREE
from rayva.llm.request import ChatAnswer, ChatRequest
from rayva.orchestration.generate_costs import Costs, costs_of, find_price, told
from rayva.orchestration.generate_report import GenerationReport, render_report
from rayva.orchestration.generate_run import Plan, forecast
from tests.instruct.planned import batch_plan, outcomes_of, price_of

TEXT = "A dog runs over the grass of a park on a bright morning."


def _answered(plan: Plan, tokens: int) -> None:
    requests = Requests(plan.settings, plan.prompts)
    cache = AnswerCache(plan.storage)
    answer = ChatAnswer(TEXT, "stop", tokens, tokens, "m", 0.1)
    cache.put_now((requests.of(task), answer) for task in plan.tasks)
    cache.close()


def _lost(plan: Plan, request: ChatRequest) -> None:
    cache = AnswerCache(plan.storage)
    asyncio.run(cache.put_lost(request))
    cache.close()


def test_calls_that_broke_off_are_told_apart(tmp_path: Path) -> None:
    plan = batch_plan(tmp_path, ["A dog runs."])
    _answered(plan, 100)
    request = Requests(plan.settings, plan.prompts).of(plan.tasks[0], 1)
    _lost(plan, request)
    _lost(plan, ChatRequest("m", ({"role": "user", "content": "another run's"},)))
    costs = costs_of(plan, outcomes_of(plan), price_of(plan))
    worst = price_of(plan).at_most(request)
    assert costs == Costs(100, 100, 0.2, 1, pytest.approx(0.2 + worst))  # type: ignore[arg-type]
    assert told(vars(costs)) == f"$0.2000 (at most ${0.2 + worst:.4f}: 1 call broke off and may be billed)"


def test_an_answer_that_samples_share_is_paid_once(tmp_path: Path) -> None:
    plan = batch_plan(tmp_path, ["A dog runs."] * 3)
    _answered(plan, 100)
    outcomes = outcomes_of(plan)
    assert sum(len(outcome.attempts) for outcome in outcomes.values()) == 3
    assert costs_of(plan, outcomes, price_of(plan)) == Costs(100, 100, 0.2, 0, 0.2)


def test_a_price_that_is_not_known_is_not_none(tmp_path: Path) -> None:
    plan = batch_plan(tmp_path, ["A dog runs."], model="unknown")
    _answered(plan, 100)
    assert find_price(plan.settings) is None
    costs = costs_of(plan, outcomes_of(plan), None)
    assert costs == Costs(100, 100, None, 0, None)
    assert told(vars(costs)) == "at a price that is not known (--prices FILE)"
    assert find_price(batch_plan(tmp_path, ["A dog runs."], teacher="symbolic").settings) == FREE


def test_a_run_without_lost_calls_tells_one_figure() -> None:
    assert told({"cost": 1.5}) == "$1.5000"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "endpoint", "base_url": "nowhere"}, "'nowhere' is no http"),
        ({"model": "unknown", "max_cost": 1}, "no price for the model 'unknown'"),
        ({"coco_instances": "i.json"}, "generation.coco_instances is given"),
        ({"source": "coco", "coco_captions": "c.json"}, "generation.input is given"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        batch_plan(tmp_path, ["A dog runs."], **settings)
    assert message in str(caught.value)


def test_a_forecast_counts_what_is_asked_once_only_once(tmp_path: Path) -> None:
    [_, alike, _] = forecast(batch_plan(tmp_path, ["A dog runs."] * 3))
    [_, one, _] = forecast(batch_plan(tmp_path, ["A dog runs."]))
    assert (alike.samples, alike.known, alike.cost) == (3, 0, one.cost)


def test_an_input_without_a_usable_context_is_told_with_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 no_caption; the first, row-0: i0\.jpg has no caption"):
        batch_plan(tmp_path, [" ", ""])


def test_the_report_tells_costs_and_how_questions_of_any_script_begin(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\n\u0427\u0442\u043e \u044d\u0442\u043e? It's?"}]
    turns += [{"from": "gpt", "value": TEXT}]
    row = {"id": "a", "image": "a.jpg", "kind": "detail", "conversations": turns}
    summary = {
        "tasks": 1, "samples": 1, "by_kind": {"detail": 1}, "rejected_answers": 0, "reasons": {},
        "errors": {}, "bad_contexts": {}, "empty_boxes": 3, "unfinished": 0,
        **asdict(Costs(10, 20, 0.5, 2, 0.75)),
    }  # fmt: skip
    page = render_report(GenerationReport("T", summary, [row], [], 1.0))
    assert "$0.5000 (at most $0.7500: 2 calls broke off and may be billed)" in page
    assert "box without an area" in page
    assert "\u0447\u0442\u043e <span class='soft small'>\u044d\u0442\u043e</span>" in page
