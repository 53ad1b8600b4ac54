"""Answers that are damaged, or lost after they were paid for."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web

from rayva.llm.cache import AnswerCache
from rayva.llm.client import BudgetSpent, ChatClient, Endpoint
from rayva.llm.prices import FREE, Budget, Price
from rayva.llm.request import ChatAnswer, ChatRequest, PassingError, PermanentError, Sampling, read_completion
from rayva.storage import Storage

ONE = ChatRequest("m", ({"role": "user", "content": "question"},), Sampling(max_tokens=50))


def completion(content: Any = "good", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, **more.pop("choice", {})}], **more}


@pytest.mark.parametrize(
    "body",
    [
        None, [], {}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": "x"}]},
        completion([{"type": "text"}]), completion(usage=[1]),
        completion(usage={"prompt_tokens": float("inf")}),
        completion(usage={"completion_tokens": float("nan")}),
        completion(usage={"prompt_tokens": "many"}),
    ],
)  # fmt: skip
def test_what_is_no_completion_is_a_passing_error_that_may_cost(body: object) -> None:
    with pytest.raises(PassingError) as caught:
        read_completion(body, ONE, 0.0)
    assert caught.value.billed


def test_an_answer_can_always_be_written_and_never_costs_less_than_nothing() -> None:
    body = completion("half \ud83d a pair", usage={"prompt_tokens": -7}, choice={"finish_reason": ["\udc00"]})
    answer = read_completion(body, ONE, 0.0)
    assert answer.text == "half \ufffd a pair"
    assert answer.prompt_tokens > 0
    pa.table({"text": [answer.text], "reason": [answer.finish_reason]})
    assert read_completion(completion("\ud83d\ude00"), ONE, 0.0).text == "\U0001f600"


@pytest.mark.parametrize("count", [10**20, 1e300, 10**9 + 1])
def test_counts_of_tokens_that_cannot_be_are_estimated(tmp_path: Path, count: float) -> None:
    storage = Storage(str(tmp_path))
    usage = {"prompt_tokens": count, "completion_tokens": count}
    good = json.dumps(completion("good", usage=usage)).encode()
    [answer] = asyncio.run(_served([good], AnswerCache(storage), Budget(None)))
    estimated = (ONE.estimated_prompt_tokens(), 2)
    assert (answer.prompt_tokens, answer.completion_tokens) == estimated
    # What was kept before such counts were refused is read in the same way.
    [file] = (tmp_path / "answers").iterdir()
    row = json.loads(file.read_text())
    row["answer"] |= usage
    file.write_text(json.dumps(row) + "\n")
    cache = AnswerCache(storage)
    known = cache.get(ONE)
    assert known is not None
    assert (known.prompt_tokens, known.completion_tokens) == estimated
    pa.table({"tokens": [known.prompt_tokens, *(a.completion_tokens for a in cache.answers())]})


def test_text_in_parts_and_refusals_are_text() -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "a dog."}]
    assert read_completion(completion(parts), ONE, 0.0).text == "It is a dog."
    refusal = {"choices": [{"message": {"content": None, "refusal": "I'm sorry."}}]}
    assert read_completion(refusal, ONE, 0.0).text == "I'm sorry."


PRICE = Price(0.0, 1.0)
"""A dollar for a million tokens of answers."""


async def _served(bodies: list[bytes], cache: AnswerCache, budget: Budget, price: Price = PRICE) -> list[Any]:
    """Asks `ONE` of a server that gives these bodies in turn, until it is answered or refused."""

    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=bodies.pop(0), content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", respond)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", first_delay=0.01)
    try:
        async with ChatClient(endpoint, cache, budget, price) as client:
            return await asyncio.gather(client.ask(ONE), return_exceptions=True)
    finally:
        await runner.cleanup()


def test_lost_answers_count_as_spent_also_after_a_restart(tmp_path: Path) -> None:
    storage, price = Storage(str(tmp_path)), PRICE
    good = json.dumps(completion(usage={"prompt_tokens": 5, "completion_tokens": 10})).encode()
    worst = 50 / 1_000_000
    budget = Budget(10 * worst)
    cache = AnswerCache(storage)
    [answer] = asyncio.run(_served([b"[" * 200_000, b"<html>", good], cache, budget))
    assert isinstance(answer, ChatAnswer)
    assert budget.spent == pytest.approx(2 * worst + 10 / 1_000_000)
    again = AnswerCache(storage)
    assert len(again) == 1
    assert again.get(ONE) is not None
    assert sum(price.of_answer(a) for a in again.answers()) == pytest.approx(budget.spent)


@pytest.mark.parametrize(("code", "calls"), [(502, 2), (429, 2), (400, 1), ("bad_gateway", 2)])
def test_an_error_that_comes_with_status_200_is_what_it_says(tmp_path: Path, code: Any, calls: int) -> None:
    """Routers to several endpoints answer so. Without a status it is no completion, and may be billed."""
    told = json.dumps({"error": {"message": "nobody is there", "code": code}}).encode()
    bodies = [told, json.dumps(completion()).encode()]
    cache = AnswerCache(Storage(str(tmp_path)))
    [answer] = asyncio.run(_served(bodies, cache, Budget(None)))
    assert 2 - len(bodies) == calls
    if calls == 1:
        assert isinstance(answer, PermanentError)
        assert "HTTP 400: nobody is there" in str(answer)
    else:
        assert isinstance(answer, ChatAnswer)
    assert len(cache.lost()) == (not isinstance(code, int))


def test_calls_cancelled_since_the_key_is_wrong_are_not_billed(tmp_path: Path) -> None:
    """Else each run with a wrong key would use up some of the budget."""

    async def run(cache: AnswerCache, budget: Budget) -> None:
        calls: list[str] = []

        async def respond(got: web.Request) -> web.Response:
            calls.append(await got.text())
            if len(calls) > 1:
                await asyncio.Event().wait()
            while len(calls) < 3:
                await asyncio.sleep(0.01)
            return web.json_response({"error": "wrong key"}, status=401)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", respond)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        endpoint = Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        async with ChatClient(endpoint, cache, budget, PRICE) as client:
            asking = [asyncio.create_task(client.ask(replace(ONE, attempt=n))) for n in range(3)]
            with pytest.raises(PermanentError):
                await asyncio.gather(*asking)
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await runner.cleanup()

    cache, budget = AnswerCache(Storage(str(tmp_path))), Budget(1.0)
    asyncio.run(run(cache, budget))
    assert (cache.lost(), budget.spent, budget.reserved) == ([], 0.0, 0.0)


def test_lost_answers_use_the_budget_up(tmp_path: Path) -> None:
    budget = Budget(2.5 * 50 / 1_000_000)
    [error] = asyncio.run(_served([b"{"] * 6, AnswerCache(Storage(str(tmp_path))), budget))
    assert isinstance(error, BudgetSpent)


def test_a_lost_answer_is_kept_in_mind_before_the_price_is_known(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    good = json.dumps(completion()).encode()
    asyncio.run(_served([b"<html>", good], AnswerCache(storage), Budget(None), FREE))
    [(digest, most)] = AnswerCache(storage).lost()
    assert digest == ONE.digest
    assert PRICE.of_answer(most) == pytest.approx(50 / 1_000_000)
