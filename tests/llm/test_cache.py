"""The cache of answers: cut at any byte, on a local disk and on an object store."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from rayva.errors import StorageError
from rayva.llm.cache import AnswerCache
from rayva.llm.request import ChatAnswer, ChatRequest
from rayva.storage import Storage

PLATFORM = Path(__file__).resolve().parents[2] / "platform"


def request(number: int) -> ChatRequest:
    return ChatRequest("m", ({"role": "user", "content": str(number)},))


def answer(text: str) -> ChatAnswer:
    return ChatAnswer(text, "stop", 1, 2, "m", 0.1)


def fill(cache: AnswerCache, numbers: range) -> None:
    async def put() -> None:
        await asyncio.gather(*(cache.put(request(n), answer(f"a{n}\n\u2028")) for n in numbers))

    asyncio.run(put())


@pytest.mark.parametrize("root", ["local", "memory://"])
def test_what_is_kept_is_found_by_others(root: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path) if root == "local" else f"memory://{uuid.uuid4().hex}")
    cache = AnswerCache(storage)
    fill(cache, range(30))
    cache.close()
    fill(cache, range(30, 40))
    cache.close()
    other = AnswerCache(storage)
    assert len(other) == 40
    for number in range(40):
        known = other.get(request(number))
        assert known is not None
        assert (known.text, known.cached) == (f"a{number}\n\u2028", True)
    assert other.get(request(40)) is None


def test_cut_at_any_byte_all_whole_answers_are_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    cache = AnswerCache(storage)
    fill(cache, range(3))
    cache.close()
    [file] = (tmp_path / "answers").iterdir()
    whole = file.read_bytes()
    for size in range(0, len(whole) + 1, 7):
        file.write_bytes(whole[:size])
        found = AnswerCache(storage)
        assert len(found) == whole[:size].count(b"\n")
        fill(found, range(5))  # what was cut is answered again, in another file
        found.close()
        assert len(AnswerCache(storage)) == 5
        for other in (tmp_path / "answers").iterdir():
            if other != file:
                other.unlink()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "x.jsonl").write_text('{"digest": "d"}\n')
    with pytest.raises(StorageError, match=r"x\.jsonl is damaged in line 1"):
        AnswerCache(storage)


def test_after_a_write_that_failed_half_way_later_answers_are_kept(tmp_path: Path) -> None:
    """A limit on the size of files stops a write in the middle of a line, as a full disk does."""
    storage = Storage(str(tmp_path))
    cache = AnswerCache(storage)
    fill(cache, range(1))
    [file] = (tmp_path / "answers").iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, hard))
    try:
        with pytest.raises(StorageError):
            fill(cache, range(1, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fill(cache, range(2, 4))
    cache.close()
    found = AnswerCache(storage)
    assert [found.get(request(n)) is not None for n in range(4)] == [True, False, True, True]
    assert all(path.read_bytes().endswith(b"\n") for path in (tmp_path / "answers").iterdir())


def test_an_answer_behind_half_a_line_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    cache = AnswerCache(storage)
    fill(cache, range(3))
    cache.close()
    [file] = (tmp_path / "answers").iterdir()
    first, second, third = file.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(first) - 1, 11):
        file.write_bytes(first[:cut] + second + third)
        assert [AnswerCache(storage).get(request(n)) is not None for n in range(3)] == [False, True, True]


WRITE = """
import asyncio, sys
from rayva.llm.cache import AnswerCache
from rayva.llm.request import ChatAnswer, ChatRequest
from rayva.storage import Storage
async def main():
    cache = AnswerCache(Storage(sys.argv[1]))
    async def one(n):
        await cache.put(ChatRequest("m", ({"role": "user", "content": str(n)},)), ChatAnswer("x" * 999, "stop", 1, 2, "m", 0.1))
        print(n, flush=True)
    for start in range(0, 10**9, 8):
        await asyncio.gather(*(one(n) for n in range(start, start + 8)))
asyncio.run(main())
"""  # noqa: E501


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(50)]
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines() if line]
    found = AnswerCache(Storage(str(tmp_path)))
    assert told
    assert all(found.get(request(number)) is not None for number in told[:-1])
