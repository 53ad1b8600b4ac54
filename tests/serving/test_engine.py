"""The built-in engine and the filter of stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayva.model.folder import Assistant
from rayva.model.generate import cut_at_stop, generate_ids
from rayva.serving.engine import BuiltinEngine
from rayva.serving.schema import Sampling
from rayva.serving.stops import StopFilter
from rayva.text.conversation import Message

ASK = [Message("user", ("What is it?",))]


@pytest.fixture
def engine(assistant: Assistant) -> Iterator[BuiltinEngine]:
    engine = BuiltinEngine(assistant)
    yield engine
    engine.close()


@given(
    pieces=st.lists(st.text(alphabet="ab#", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab#", min_size=1, max_size=3), max_size=3),
)
def test_the_filter_passes_all_up_to_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut into pieces, what passes is the text up to the first stop string.

    The first is the one that is complete first; a stream cannot know of a longer one that began earlier.
    """
    stream, shown = StopFilter(tuple(stops)), ""
    for piece in pieces:
        for character in piece:
            shown += stream.push(character)
    stopped = stream.stopped
    shown += stream.flush()
    text = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    expected = cut_at_stop(text[: min(ends)], tuple(stops)) if ends else text
    assert shown == expected


def test_pieces_end_with_one_that_counts(engine: BuiltinEngine) -> None:
    async def collect() -> list[object]:
        return [piece async for piece in engine.generate(ASK, [], Sampling(8))]

    *pieces, last = asyncio.run(collect())
    assert all(piece.finish is None for piece in pieces)
    assert last.finish in ("stop", "length")
    assert last.prompt_tokens > 0
    assert 0 < last.completion_tokens <= 8


def test_what_ended_an_answer_and_its_length_are_the_models_own(
    engine: BuiltinEngine, assistant: Assistant
) -> None:
    """A random model writes otherwise than its tokenizer splits; some of these answers end with EOS."""

    async def last(seed: int) -> tuple[object, int]:
        pieces = [piece async for piece in engine.generate(ASK, [], Sampling(12, 1.0, seed=seed))]
        return pieces[-1].finish, pieces[-1].completion_tokens

    def written(seed: int) -> int:
        batch = assistant._batch([ASK], [[]])
        return len(generate_ids(assistant.model, batch, assistant._sampling(12, 1.0, 1.0, seed))[0])

    async def all_of(seeds: range) -> list[tuple[object, int]]:
        return [await last(seed) for seed in seeds]

    expected = [("length" if written(seed) == 12 else "stop", written(seed)) for seed in range(60)]
    assert len({finish for finish, _ in expected}) == 2
    assert asyncio.run(all_of(range(60))) == expected


def test_a_closed_stream_frees_the_engine(engine: BuiltinEngine) -> None:
    """The next request is answered although the first one had hundreds of tokens to go."""

    async def leave_then_ask() -> int:
        abandoned = engine.generate(ASK, [], Sampling(400))
        first = await anext(abandoned)
        assert first.finish is None
        await abandoned.aclose()
        return len([piece async for piece in engine.generate(ASK, [], Sampling(1))])

    assert asyncio.run(leave_then_ask()) >= 1


def test_a_request_given_up_before_its_turn_is_not_computed(
    engine: BuiltinEngine, assistant: Assistant
) -> None:
    computed: list[int] = []

    async def crowd() -> None:
        async def ask(tokens: int) -> None:
            async for piece in engine.generate(ASK, [], Sampling(tokens)):
                if piece.finish:
                    computed.append(tokens)

        first = asyncio.create_task(ask(40))
        second = asyncio.create_task(ask(41))
        third = asyncio.create_task(ask(42))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)

    asyncio.run(crowd())
    assert computed == [40, 42]


def test_an_error_in_the_thread_reaches_the_caller(engine: BuiltinEngine) -> None:
    from rayva.serving.errors import ApiError

    async def ask() -> None:
        async for _ in engine.generate([Message("user", ("x " * 2000,))], [], Sampling(8)):
            pass

    with pytest.raises(ApiError, match="context"):
        asyncio.run(ask())
