"""When checkpoints are saved, which are kept, and what happens when they cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rayva.storage import Storage
from rayva.training.checkpoint import Progress, write_manifest, write_progress
from rayva.training.loop import train
from rayva.training.resume import FAILED, SavedCheckpoint
from rayva.training.stop import TrainingStopped
from rayva.training.store import CheckpointStore
from tests.s3 import BUCKET, Server
from tests.training.support import state_bytes, tiny_job

pytestmark = pytest.mark.usefixtures("process_group")


@dataclass
class StoreHooks:
    """A store in a folder, as a worker has; `at` runs something after a step."""

    root: Path | str
    at: dict[int, Any] = field(default_factory=dict)
    last: int = 2
    best: int = 0
    notice: bool = False
    losses: list[float] = field(default_factory=list)
    failures: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = CheckpointStore(Storage(str(self.root)), "saved", self.last, self.best)
        self.store.start()

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])
        self.failures.append(metrics[FAILED])
        if step in self.at:
            self.at[step](self)

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        self.store.keep(folder, step)
        self.stored.append(step)

    def leaving(self) -> bool:
        return self.notice

    def checkpoints(self) -> list[SavedCheckpoint]:
        return [*self.store.checkpoints()]

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.store.checkpoints() if checkpoint.progress()]


def crash(hooks: StoreHooks) -> None:
    raise InterruptedError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def _expected(tmp_path: Path, **settings: Any) -> tuple[list[float], dict[str, bytes]]:
    hooks = StoreHooks(tmp_path / "whole")
    model = train(tiny_job(epochs=3.0, **settings), hooks).engine.model
    return hooks.losses, state_bytes(model)


@pytest.mark.parametrize(
    ("full", "settings"),
    [
        ("the storage", {}),
        ("the place for temporary files", {}),
        *(
            pytest.param("the place for temporary files", settings, marks=pytest.mark.slow)
            for settings in ({"zero": 2}, {"zero": 3}, {"precision": "bfloat16"})
        ),
    ],
)
def test_training_goes_on_over_a_full_disk(
    full: str, settings: dict[str, Any], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    losses, weights = _expected(tmp_path, **settings)
    root = small_disk if full == "the storage" else tmp_path / "run"
    if full != "the storage":
        monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    hooks = StoreHooks(root, last=1, at={4: lambda _: fill(small_disk), 7: lambda _: empty(small_disk)})
    result = train(tiny_job(epochs=3.0, **settings), hooks)
    assert (hooks.losses, state_bytes(result.engine.model)) == (losses, weights)
    assert result.counts[FAILED] == 1
    assert (hooks.failures[5], hooks.failures[-1]) == (0, 1)
    (told,) = [message for message in caplog.messages if "could not be saved" in message]
    assert "after step 6" in told
    assert "No space left" in told
    assert hooks.steps() == [9]


def test_training_goes_on_without_a_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses, _ = _expected(tmp_path)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    hooks = StoreHooks(tmp_path / "run", at={4: lambda _: place.rmdir(), 7: lambda _: place.mkdir()})
    assert train(tiny_job(epochs=3.0), hooks).counts[FAILED] == 1
    assert hooks.losses == losses
    (told,) = [message for message in caplog.messages if "could not be saved" in message]
    assert "after step 6" in told
    assert str(place) in told
    assert hooks.steps() == [9, 3]


def test_training_goes_on_over_a_client_that_fails_in_its_own_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in the uploading thread of one rank would leave the others waiting."""

    class Breaking(StoreHooks):
        def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
            if step == 6:
                raise RuntimeError("the client's connection pool is closed")
            super().on_checkpoint(folder, step, metrics)

    hooks = Breaking(tmp_path)
    assert train(tiny_job(epochs=3.0), hooks).counts[FAILED] == 1
    assert any("connection pool is closed" in message for message in caplog.messages)
    assert hooks.steps() == [9, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_checkpoint_that_cannot_be_removed_is_no_failed_one(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pinned: list[Path] = []

    def pin(hooks: StoreHooks) -> None:
        while not hooks.stored:
            time.sleep(0.01)  # the test's own limit ends this
        (oldest,) = (tmp_path / "run" / "saved").iterdir()
        pinned.append(oldest / "engine")
        subprocess.run(["mount", "--bind", str(small_disk), str(pinned[0])], check=True)

    hooks = StoreHooks(tmp_path / "run", last=1, at={4: pin})
    try:
        result = train(tiny_job(epochs=3.0), hooks)
    finally:
        subprocess.run(["umount", *map(str, pinned)], check=True)
    assert result.counts[FAILED] == 0
    assert any("could not be removed" in message for message in caplog.messages)
    assert hooks.steps()[0] == 9


def test_training_goes_on_over_a_store_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses, weights = _expected(tmp_path)
    server = Server(monkeypatch)

    def told_of_a_failure() -> list[str]:
        return [message for message in caplog.messages if "could not be saved" in message]

    def wait_until(happened: Callable[[], object]) -> None:
        while not happened():
            time.sleep(0.01)  # the test's own limit ends this

    def goes(hooks: StoreHooks) -> None:
        wait_until(lambda: hooks.stored)
        server.stop()

    def comes_back(_: StoreHooks) -> None:
        wait_until(told_of_a_failure)
        server.start()

    hooks = StoreHooks(f"s3://{BUCKET}/run", last=1, at={4: goes, 7: comes_back})
    result = train(tiny_job(epochs=3.0), hooks)
    assert (hooks.losses, state_bytes(result.engine.model)) == (losses, weights)
    assert result.counts[FAILED] == 1
    (told,) = told_of_a_failure()
    assert "after step 6" in told
    assert f"s3://{BUCKET}/run/saved/checkpoint" in told
    assert "Could not connect" in told
    assert hooks.steps() == [9]
    server.forget()


def test_the_checkpoint_before_a_failed_one_is_gone_on_from(small_disk: Path, tmp_path: Path) -> None:
    losses, weights = _expected(tmp_path)
    with pytest.raises(InterruptedError):
        train(tiny_job(epochs=3.0), StoreHooks(small_disk, at={4: lambda _: fill(small_disk), 8: crash}))
    hooks = StoreHooks(small_disk)
    assert hooks.steps() == [3]
    assert {path.name for path in small_disk.iterdir()} == {"filler", "saved"}
    empty(small_disk)
    result = train(tiny_job(epochs=3.0), hooks)
    assert (hooks.losses, state_bytes(result.engine.model)) == (losses[3:], weights)


def test_a_new_checkpoint_of_the_same_step_does_not_touch_the_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses, weights = _expected(tmp_path)
    with pytest.raises(InterruptedError):
        train(tiny_job(epochs=3.0), StoreHooks(tmp_path / "run", at={7: crash}))
    (newest,) = (tmp_path / "run" / "saved").glob("*_00000006")
    victim = next(newest.glob("engine/*.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(InterruptedError):
        train(tiny_job(epochs=3.0), StoreHooks(tmp_path / "run", at={8: crash}))
    assert any(victim.name in message and "passed over" in message for message in caplog.messages)
    assert not newest.exists(), "the sound one of the same step replaces it"
    hooks = StoreHooks(tmp_path / "run")
    assert hooks.steps() == [6, 3]
    result = train(tiny_job(epochs=3.0), hooks)
    assert (hooks.losses, state_bytes(result.engine.model)) == (losses[6:], weights)


def test_a_checkpoint_is_due_every_so_many_minutes(tmp_path: Path) -> None:
    hooks = StoreHooks(tmp_path, last=9)
    train(tiny_job(checkpoint_every=1000, checkpoint_minutes=1e-9), hooks)
    assert hooks.steps() == [3, 2, 1]


def test_a_notice_saves_once_and_at_once(tmp_path: Path) -> None:
    def notify(hooks: StoreHooks) -> None:
        hooks.notice = True

    hooks = StoreHooks(tmp_path)
    train(tiny_job(epochs=2.0, checkpoint_every=1000), hooks)
    assert hooks.steps() == []
    hooks = StoreHooks(tmp_path, at={5: notify})
    train(tiny_job(epochs=2.0, checkpoint_every=1000), hooks)
    assert hooks.steps() == [5]


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    losses, weights = _expected(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    hooks = StoreHooks(tmp_path / "run", at={5: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(TrainingStopped, match="after step 5"):
        train(tiny_job(epochs=3.0), hooks)
    assert signal.getsignal(signal.SIGTERM) is before
    assert hooks.steps() == [5, 3]
    rest = StoreHooks(tmp_path / "run")
    result = train(tiny_job(epochs=3.0), rest)
    assert hooks.losses + rest.losses == losses
    assert state_bytes(result.engine.model) == weights


def test_sigterm_without_room_does_not_promise_to_go_on_from_there(small_disk: Path) -> None:
    def stop(_: StoreHooks) -> None:
        fill(small_disk)
        os.kill(os.getpid(), signal.SIGTERM)

    hooks = StoreHooks(small_disk, at={5: stop})
    with pytest.raises(TrainingStopped, match=r"after step 5.*\n.*the last checkpoint that could be saved"):
        train(tiny_job(epochs=3.0), hooks)
    assert hooks.steps() == [3]


def test_an_unfinished_checkpoint_is_not_fetched_from_an_object_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(monkeypatch)
    with pytest.raises(InterruptedError):
        train(tiny_job(epochs=3.0), StoreHooks(f"s3://{BUCKET}/run", at={7: crash}))
    newest, before = StoreHooks(f"s3://{BUCKET}/run").store.checkpoints()
    newest.storage.delete(f"{newest.rel}/manifest-00000.json")
    fetched = []
    get = type(newest.storage).localize
    monkeypatch.setattr(
        type(newest.storage), "localize", lambda self, rel: fetched.append(rel) or get(self, rel)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hooks = StoreHooks(f"s3://{BUCKET}/run")
    train(tiny_job(epochs=3.0), hooks)
    assert len(hooks.losses) == 12 - before.step
    assert newest.rel not in fetched
    assert before.rel in fetched
    assert any("was not finished" in message for message in caplog.messages)
    # Nothing as large as a checkpoint is left on the local disk.
    assert not list(tmp_path.rglob("*.pt"))
    server.forget()


def _put(store: CheckpointStore, scratch: Path, step: int, loss: float | None, ranks: int = 1) -> None:
    """What a finished rank 0 of `ranks` stores."""
    folder = scratch / f"{step}"
    folder.mkdir(parents=True)
    write_progress(folder, Progress(step, ranks, 0, "float32", "job", loss=loss))
    write_manifest(folder, 0)
    store.put(folder, step)


def test_the_last_and_the_best_are_kept_and_an_unfinished_one_counts_as_none(tmp_path: Path) -> None:
    store = CheckpointStore(Storage(str(tmp_path / "root")), "saved", 2, 1)
    store.start()
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        _put(store, tmp_path / "scratch", step, loss)
    _put(store, tmp_path / "scratch", 6, 0.5, ranks=2)  # the other rank has not written yet
    store.prune()
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [6, 5, 4, 2]
    _put(store, tmp_path / "scratch", 7, 9.0)
    store.prune()
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [7, 5, 2]
