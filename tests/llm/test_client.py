"""The client against a real endpoint that misbehaves in every way that it must know."""

import asyncio
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from rayva.errors import RecipeError
from rayva.llm import client, limits
from rayva.llm.cache import AnswerCache
from rayva.llm.client import BudgetSpent, ChatClient, Endpoint, parse_retry_after
from rayva.llm.prices import FREE, Budget, Price, Prices
from rayva.llm.request import ChatAnswer, ChatRequest, PassingError, PermanentError, Sampling
from rayva.storage import Storage
from tests.llm.running import Running, teacher


def request(number: int, max_tokens: int = 50) -> ChatRequest:
    return ChatRequest(
        "m", ({"role": "user", "content": f"question {number}"},), Sampling(max_tokens=max_tokens)
    )


def ask_all(
    server: Running,
    requests: list[ChatRequest],
    cache: AnswerCache | None = None,
    budget: Budget | None = None,
    price: Price = FREE,
    **settings: object,
) -> list[ChatAnswer | BaseException]:
    endpoint = Endpoint(server.base_url, first_delay=0.01, **settings)  # type: ignore[arg-type]

    async def run() -> list[ChatAnswer | BaseException]:
        async with ChatClient(endpoint, cache, budget, price) as client:
            return await asyncio.gather(*(client.ask(r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


def test_every_passing_error_is_tried_again_and_costs_one_call(tmp_path: Path) -> None:
    faults = ["retry_after", "server_error", "cut", "not_json", "slow"]
    with teacher(tmp_path, faults=faults, every=2, slow=5.0) as server:
        answers = ask_all(server, [request(n) for n in range(12)], timeout=1.0, concurrency=4)
        assert [a.text for a in answers if isinstance(a, ChatAnswer)] == [
            f"echo question {n}" for n in range(12)
        ]
        assert server.calls == 12 + len(faults)


def test_a_wrong_key_ends_at_once_and_is_not_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "secret-wrong")
    with teacher(tmp_path, key="right") as server:
        [error] = ask_all(server, [request(0)], api_key_env="TEST_KEY")
        assert isinstance(error, PermanentError)
        assert error.fatal
        assert "secret-wrong" not in str(error)
        assert server.calls == 1
        monkeypatch.setenv("TEST_KEY", "right")
        [answer] = ask_all(server, [request(0)], api_key_env="TEST_KEY")
        assert isinstance(answer, ChatAnswer)


def test_a_server_that_is_away_is_given_up_after_the_attempts(tmp_path: Path) -> None:
    with teacher(tmp_path) as server:
        server.kill()
        [error] = ask_all(server, [request(0)], attempts=3)
    assert isinstance(error, PassingError)
    assert "after 3 attempts" in str(error)


def test_a_server_that_goes_on_failing_is_given_up(tmp_path: Path) -> None:
    with teacher(tmp_path, faults=["server_error"] * 200) as server:
        errors = ask_all(server, [request(n) for n in range(80)], attempts=2, concurrency=1)
        assert server.calls == 2 * 50
    assert all(isinstance(error, PassingError) for error in errors)
    assert str(errors[-1]) == "given up: 50 requests in a row; HTTP 500: oops (after 2 attempts)"


def test_refusals_of_single_requests_are_no_failures_of_the_endpoint(tmp_path: Path) -> None:
    refused = [replace(request(n), sampling=Sampling(temperature=0.5)) for n in range(60)]
    with teacher(tmp_path, forbidden="temperature") as server:
        answers = ask_all(server, [*refused, request(0)], concurrency=1)
    assert [type(answer) for answer in answers] == [PermanentError] * 60 + [ChatAnswer]


def test_refusals_of_single_requests_are_no_successes_either(tmp_path: Path) -> None:
    asked = [
        replace(request(n), sampling=Sampling(temperature=0.5)) if n % 2 else request(n) for n in range(120)
    ]
    with teacher(tmp_path, forbidden="temperature", faults=["server_error"] * 200) as server:
        ask_all(server, asked, attempts=1, concurrency=1)
        assert server.calls == 99  # the fiftieth failure, and a refusal between any two


@pytest.mark.parametrize(
    ("status", "error", "fatal"),
    [
        (402, {"message": "Insufficient Balance"}, True),
        (400, {"message": "Model Not Exist", "code": "invalid_request_error"}, True),
        (400, {"message": "The model `m` does not exist"}, True),
        (400, {"message": "no such thing", "code": "model_not_found"}, True),
        (400, {"message": "The prompt was found to break the rules of this model"}, False),
    ],
)
def test_what_every_call_would_meet_is_fatal(tmp_path: Path, status: int, error: object, fatal: bool) -> None:
    with teacher(tmp_path, refuse=[status, {"error": error}]) as server:
        [refusal] = ask_all(server, [request(0)])
    assert isinstance(refusal, PermanentError)
    assert refusal.fatal == fatal


def test_refusals_that_name_a_pause_use_no_attempt_up_and_become_few(tmp_path: Path) -> None:
    with teacher(tmp_path, window=[10, 0.25]) as server:
        answers = ask_all(server, [request(n) for n in range(100)], concurrency=40, attempts=1)
        assert all(isinstance(answer, ChatAnswer) for answer in answers)
        # Thirty of the first forty; ten times as many in all where all go out again together.
        assert server.calls <= 200


def test_an_endpoint_that_only_asks_for_pauses_is_given_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(client, "_MAX_REFUSED_SECONDS", 0.4)
    with teacher(tmp_path, window=[0, 0.1]) as server:
        errors = ask_all(server, [request(n) for n in range(40)], concurrency=4, attempts=1)
        assert server.calls <= 30
    assert all(isinstance(error, PassingError) for error in errors)
    assert str(errors[-1]).startswith("given up: no answer to anything for")
    assert "HTTP 429: too many" in str(errors[-1])


def test_calls_that_are_cancelled_in_flight_count_as_spent_and_lost(tmp_path: Path) -> None:
    storage, price = Storage(str(tmp_path / "s")), Price(0.0, 1.0)
    budget = Budget(1.0)

    async def run(server: Running) -> None:
        endpoint = Endpoint(server.base_url, concurrency=2)
        async with ChatClient(endpoint, AnswerCache(storage), budget, price) as asker:
            calls = [asyncio.create_task(asker.ask(request(n))) for n in range(5)]
            while server.calls < 2:
                await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            told = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in told] == [asyncio.CancelledError] * 5

    with teacher(tmp_path, latency=5.0) as server:
        asyncio.run(run(server))
    lost = AnswerCache(storage).lost()
    assert {digest for digest, _ in lost} == {request(0).digest, request(1).digest}
    assert budget.spent == pytest.approx(sum(price.of_answer(most) for _, most in lost))
    assert budget.spent > 0
    assert budget.reserved == 0


def test_failures_with_successes_between_them_are_no_row(tmp_path: Path) -> None:
    with teacher(tmp_path, faults=["server_error"] * 60, every=2) as server:
        answers = ask_all(server, [request(n) for n in range(140)], attempts=1, concurrency=1)
        assert server.calls == 140
    assert sum(isinstance(answer, ChatAnswer) for answer in answers) == 80


def test_a_model_that_calls_the_longest_answer_otherwise_is_asked_in_its_words(tmp_path: Path) -> None:
    with teacher(tmp_path, limit_name="max_completion_tokens") as server:
        answers = ask_all(server, [request(n) for n in range(5)], concurrency=1)
        assert all(isinstance(answer, ChatAnswer) for answer in answers)
        assert server.calls == 6
    (tmp_path / "other").mkdir()
    # Some refuse any value with both names in their words.
    with teacher(tmp_path / "other", limit_name="nothing, max_completion_tokens or") as server:
        [error] = ask_all(server, [request(0)])
        assert isinstance(error, PermanentError)
        assert server.calls == 2


def test_an_endpoint_that_takes_no_seed_is_asked_without(tmp_path: Path) -> None:
    seeded = [replace(request(n), sampling=Sampling(max_tokens=50, seed=n)) for n in range(4)]
    with teacher(tmp_path, forbidden="seed") as server:
        answers = ask_all(server, seeded, concurrency=1)
        assert all(isinstance(answer, ChatAnswer) for answer in answers)
        assert server.calls == 5
    (tmp_path / "other").mkdir()
    with teacher(tmp_path / "other", forbidden="temperature") as server:
        [error] = ask_all(server, [replace(seeded[0], sampling=Sampling(temperature=0.5))])
        assert isinstance(error, PermanentError)  # another temperature would be another answer
        assert server.calls == 1


def test_no_more_calls_in_flight_than_allowed(tmp_path: Path) -> None:
    with teacher(tmp_path, latency=0.05) as server:
        started = time.monotonic()
        ask_all(server, [request(n) for n in range(12)], concurrency=3)
        assert time.monotonic() - started >= 4 * 0.05


def test_an_answer_is_paid_once_also_in_a_later_process(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "s"))
    with teacher(tmp_path) as server:
        first = ask_all(server, [request(n) for n in range(20)], AnswerCache(storage))
        again = ask_all(server, [request(n) for n in range(25)], AnswerCache(storage))
        assert server.calls == 25
    texts = [a.text for a in first if isinstance(a, ChatAnswer)]
    assert [a.text for a in again[:20] if isinstance(a, ChatAnswer)] == texts
    assert [a.cached for a in again if isinstance(a, ChatAnswer)] == [True] * 20 + [False] * 5


def test_the_same_request_in_flight_twice_is_paid_once(tmp_path: Path) -> None:
    cache = AnswerCache(Storage(str(tmp_path / "s")))
    with teacher(tmp_path, latency=0.1) as server:
        # One slot: whoever waits for another's call must not hold it.
        answers = ask_all(server, [request(n % 2) for n in range(6)], cache, concurrency=1)
        assert server.calls == 2
    told = [(a.text, a.cached) for a in answers if isinstance(a, ChatAnswer)]
    assert told == [(f"echo question {n % 2}", n >= 2) for n in range(6)]


def test_who_waits_for_the_same_request_gets_its_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "wrong")
    with teacher(tmp_path, key="right", latency=0.05) as server:
        errors = ask_all(server, [request(0)] * 3, api_key_env="TEST_KEY")
        assert [type(error) for error in errors] == [PermanentError] * 3
        assert server.calls == 1
        # An error is not kept: a later call asks again.
        monkeypatch.setenv("TEST_KEY", "right")
        assert isinstance(ask_all(server, [request(0)], api_key_env="TEST_KEY")[0], ChatAnswer)


def test_who_waits_for_a_request_that_is_cancelled_asks_itself(tmp_path: Path) -> None:
    async def run(server: Running) -> list[ChatAnswer | BaseException]:
        async with ChatClient(Endpoint(server.base_url, concurrency=1)) as client:
            calls = [asyncio.create_task(client.ask(request(0))) for _ in range(4)]
            while server.calls == 0:
                await asyncio.sleep(0.01)
            calls[1].cancel()  # one that waits takes nobody with it
            calls[0].cancel()
            return await asyncio.gather(*calls, return_exceptions=True)

    with teacher(tmp_path, latency=0.1) as server:
        answers = asyncio.run(run(server))
        assert server.calls == 2
    assert [type(a) for a in answers] == [asyncio.CancelledError] * 2 + [ChatAnswer] * 2


def test_another_sampling_or_attempt_is_another_question() -> None:
    base = ChatRequest("m", ({"role": "user", "content": "q"},))
    others = [
        ChatRequest("n", base.messages),
        ChatRequest("m", ({"role": "user", "content": "Q"},)),
        ChatRequest("m", base.messages, Sampling(temperature=0.5)),
        ChatRequest("m", base.messages, attempt=1),
    ]
    assert len({r.digest for r in (base, *others)}) == 5
    assert ChatRequest("m", ({"content": "q", "role": "user"},)).digest == base.digest


def test_the_budget_is_never_passed_and_what_is_left_is_used(tmp_path: Path) -> None:
    # The endpoint bills 100 + 50 tokens: 0.00025 dollars. A call may cost as much as 0.00005 more.
    price = Price(1.0, 3.0)
    budget = Budget(0.0025)
    with teacher(tmp_path, latency=0.01, prompt_tokens=10) as server:
        answers = ask_all(server, [request(n) for n in range(40)], budget=budget, price=price, concurrency=8)
        calls = server.calls
    refused = [a for a in answers if isinstance(a, BudgetSpent)]
    answered = [a for a in answers if isinstance(a, ChatAnswer)]
    assert len(answered) + len(refused) == 40
    assert len(answered) == calls
    assert budget.spent == pytest.approx(sum(price.of_answer(a) for a in answered))
    assert 0.002 < budget.spent <= 0.0025
    assert budget.reserved == pytest.approx(0)


def test_nobody_waits_for_what_rounding_leaves_of_a_budget() -> None:
    budget = Budget(1e9)
    calls = [1e6 / 3 + 0.1 * n for n in range(1000)]
    assert all(map(budget.reserve, calls))
    for worst in reversed(calls):
        assert budget.waits
        budget.settle(worst, 0.0)
    assert not budget.waits
    assert budget.reserved == 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), (None, None), ("soon", None), ("nan", None), ("inf", None)],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    seconds = parse_retry_after(formatdate(time.time() + 30, usegmt=True))
    assert seconds is not None
    assert 27 < seconds <= 30


def test_limits_on_requests_and_tokens_hold_calls_back(tmp_path: Path) -> None:
    # 600 a minute: five seconds' worth (50) at once, then one in about a tenth of a second.
    with teacher(tmp_path) as server:
        started = time.monotonic()
        ask_all(server, [request(n) for n in range(55)], requests_per_minute=600, concurrency=64)
        assert time.monotonic() - started >= 0.4


def test_calls_that_wait_for_a_limit_keep_a_pause_that_is_asked_for_meanwhile(tmp_path: Path) -> None:
    # 1200 tokens a minute: 100 at once, then 18 a second. The first call is answered with 429 while the
    # second, for which the limit has room about half a second later, waits for it.
    with teacher(tmp_path, faults=["retry_after"], pause=1.0, prompt_tokens=1) as server:
        answers = ask_all(server, [request(0, 10), request(1, 80)], tokens_per_minute=1200, concurrency=2)
        stats = server.stats()
    assert all(isinstance(answer, ChatAnswer) for answer in answers)
    assert (stats["calls"], stats["early"]) == (3, 0)


@pytest.mark.parametrize("per_minute", [0.5, 1, 5, 12, 13, 60, 600])
def test_no_minute_has_more_calls_than_the_limit(monkeypatch, per_minute: float) -> None:
    now = 1000.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    bucket = limits._Bucket(per_minute)
    starts = []
    for _ in range(int(5 * per_minute) + 3):
        now += bucket.take(1.0)
        starts.append(now)
    for first, start in enumerate(starts):
        assert sum(start <= other < start + 60 for other in starts[first:]) <= max(1, per_minute)
    assert now - 1000.0 <= 60 * 6.1 + 3 * 60 / per_minute  # nor much fewer


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "http://user:hunter2@host/v1"])
def test_addresses_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Endpoint(url).check()
    assert "hunter2" not in str(caught.value)


def test_prices_of_families_and_of_a_table_of_ones_own(tmp_path: Path) -> None:
    prices = Prices.load()
    assert prices.find("gpt-4o-2024-08-06") == prices.find("gpt-4o") != prices.find("gpt-4o-mini")
    assert prices.find("gpt-4-0613") == prices.find("gpt-4")
    assert prices.find("gpt-4o-2024-05-13") != prices.find("gpt-4o")
    assert prices.find("gpt-4o-audio-preview") is None
    assert prices.find("nobody-knows") is None
    with pytest.raises(RecipeError, match="nobody-knows"):
        prices.require("nobody-knows", "--max-cost")
    own = tmp_path / "prices.yaml"
    own.write_text("nobody-knows: {prompt: 1, completion: 2}\n")
    assert Prices.load(str(own)).require("nobody-knows", "x").of(1_000_000, 500_000) == 2.0
    own.write_text("nobody-knows: 3\n")
    with pytest.raises(RecipeError, match=r"prices\.yaml"):
        Prices.load(str(own))
