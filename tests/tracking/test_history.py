from __future__ import annotations

from pathlib import Path

import pytest

from rayva.storage import Storage
from rayva.tracking import history as history_module
from rayva.tracking.history import History, read_history


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def test_rows_are_kept_in_order_and_a_repeated_step_replaces_its_row(storage: Storage) -> None:
    first = History(storage, "m.jsonl")
    first.add([(2, {"loss": 2.0}), (1, {"loss": 3.0}), (0, {"images": 9.0})])
    first.write()
    second = History(storage, "m.jsonl")  # the job was started again
    second.add([(2, {"loss": 2.5}), (3, {"loss": 1.0})])
    second.write()
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": 1.0}]
    assert read_history(storage, "m.jsonl") == rows


def test_nothing_is_written_for_a_step_without_history(storage: Storage) -> None:
    empty = History(storage, "none.jsonl")
    empty.add([(0, {"images": 9.0})])
    empty.write()
    assert not storage.exists("none.jsonl")
    assert read_history(storage, "none.jsonl") == []


def test_long_before_the_end_rows_are_on_the_storage(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_LOCAL_SECONDS", 0.0)
    monkeypatch.setattr(history_module, "_REMOTE_SECONDS", 0.0)
    monkeypatch.setattr(history_module, "_MOST_OF_THE_TIME", 1e9)
    running = History(storage, "live.jsonl")
    running.add([(1, {"loss": 3.0})])
    assert len(read_history(storage, "live.jsonl")) == 1
