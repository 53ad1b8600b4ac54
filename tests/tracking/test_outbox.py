"""The outbox with a server of its own that can be taken away, break, or refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rayva.storage import Storage
from rayva.tracking import outbox as outbox_module
from rayva.tracking.outbox import SPOOL, Operation, Outbox, Rejected, ServerAway


class Store:
    """Takes operations in memory. `fail` is called before each."""

    def __init__(self, fail: Callable[[Operation], None] = lambda operation: None) -> None:
        self.taken: list[int] = []
        self.fail = fail
        self.up = threading.Event()
        self.up.set()

    def connect(self) -> None:
        self._check()

    def apply(self, operation: Operation) -> None:
        self._check()
        self.fail(operation)
        self.taken.append(operation["number"])

    def _check(self) -> None:
        if not self.up.is_set():
            raise ServerAway("connection refused")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "_GATHER_SECONDS", 0.01)
    monkeypatch.setattr(outbox_module, "_RETRY_SECONDS", 0.05)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def operations(*numbers: int) -> list[Operation]:
    return [{"op": "metrics", "run": "r", "number": number} for number in numbers]


def test_everything_arrives_once_and_in_order(storage: Storage) -> None:
    store = Store()
    box = Outbox(storage, store, "a", "shown")
    for number in range(200):
        box.add(*operations(number))
    assert box.wait(30)
    assert store.taken == list(range(200))
    assert storage.list(SPOOL) == []
    box.close(5)


def test_while_the_server_is_away_operations_are_kept_and_sent_later(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    box = Outbox(storage, store, "a", "http://***@host")
    box.add(*operations(0, 1))
    assert box.wait(30)
    store.up.clear()
    for number in range(2, 50):
        box.add(*operations(number))
    assert box.wait(30) is False
    assert box.away == "connection refused"
    assert storage.list(SPOOL) != []
    store.up.set()
    assert box.wait(30)
    assert box.away is None
    assert store.taken == list(range(50))
    box.close(5)
    said = capsys.readouterr().err
    assert said.count("cannot be reached") == 1
    assert said.count("has taken everything") == 1
    assert str(storage.uri(SPOOL)) in said


def test_what_a_job_leaves_the_next_one_sends_first(storage: Storage) -> None:
    away = Store()
    away.up.clear()
    first = Outbox(storage, away, "a", "shown")
    first.add(*operations(1, 2))
    first.close(5)
    assert away.taken == []
    store = Store()
    second = Outbox(storage, store, "a", "shown")
    second.add(*operations(3))
    assert second.wait(30)
    assert store.taken == [1, 2, 3]
    second.close(5)


def test_what_is_kept_for_another_server_stays(storage: Storage) -> None:
    away = Store()
    away.up.clear()
    first = Outbox(storage, away, "a", "shown")
    first.add(*operations(1))
    first.close(5)
    store = Store()
    second = Outbox(storage, store, "b", "shown")
    second.add(*operations(2))
    second.close(5)
    assert store.taken == [2]
    assert len(storage.list(SPOOL)) == 1


def test_after_persist_a_killed_job_has_lost_nothing(storage: Storage) -> None:
    away = Store()
    away.up.clear()
    box = Outbox(storage, away, "a", "shown")
    box.add(*operations(1, 2, 3))
    box.persist()
    kept = "".join(storage.read_bytes(f"{SPOOL}/{name}").decode() for name in storage.list(SPOOL))
    assert kept.count('"op"') == 3
    box.close(5)


def test_a_refused_operation_does_not_hold_up_the_others(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(operation: Operation) -> None:
        if operation["number"] == 1:
            raise Rejected("bad name")

    store = Store(refuse)
    box = Outbox(storage, store, "a", "shown")
    box.add(*operations(0, 1, 2))
    assert box.wait(30)
    assert store.taken == [0, 2]
    assert "bad name" in caplog.text
    box.close(5)


def test_a_defect_in_the_thread_reaches_the_caller(storage: Storage) -> None:
    def fail(operation: Operation) -> None:
        raise ZeroDivisionError("defect")

    box = Outbox(storage, Store(fail), "a", "shown")
    box.add(*operations(0))
    with pytest.raises(ZeroDivisionError):
        box.wait(30)
    assert isinstance(box.fault, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        box.add(*operations(1))
