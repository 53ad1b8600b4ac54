"""Interruptions that Python itself would lose, or would hand on as another exception."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, field_serializer

from rayva import interruption
from rayva.interruption import Interruptions
from rayva.orchestration.console import INTERRUPTED, guarded


class InterruptedAtItsEnd:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class InterruptedWhenWritten(BaseModel):
    number: int = 1

    @field_serializer("number")
    def _written(self, number: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return number


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook
    yield
    assert sys.unraisablehook is hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_a_finaliser_loses_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "AGAIN_SECONDS", 1.0)  # surely not before pytest.raises
    with Interruptions() as interruptions:
        lost = InterruptedAtItsEnd()
        del lost
        assert interruptions.received, "lost so far"
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)


def test_what_a_finaliser_loses_goes_to_the_handler_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "AGAIN_SECONDS", 1.0)

    class Told(KeyboardInterrupt):
        pass

    def tell(*_: object) -> None:
        raise Told

    with Interruptions():
        signal.signal(signal.SIGINT, tell)
        lost = InterruptedAtItsEnd()
        del lost
        with pytest.raises(Told):
            time.sleep(20)


def test_other_faults_of_finalisers_are_reported_as_ever() -> None:
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("no interruption")

    told: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda lost: told.append(lost.exc_value)
    try:
        with Interruptions():
            faulty = Faulty()
            del faulty
    finally:
        sys.unraisablehook = hook
    assert [str(error) for error in told] == ["no interruption"]


def test_an_interruption_that_arrives_as_another_exception(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: len(InterruptedWhenWritten().model_dump()), "go on with: it") == INTERRUPTED
    assert capsys.readouterr().err.strip() == "go on with: it"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "what is left is to clean up"


def test_a_fault_without_an_interruption_is_no_interruption() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0, "go on with: it")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruptions(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with Interruptions():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_command_stopped_inside_a_library_says_nothing() -> None:
    code = """
import sys
from tests.core.test_interruption import InterruptedWhenWritten
from rayva import cli
from rayva.commands import plan
plan.run = lambda options: InterruptedWhenWritten().model_dump()
raise SystemExit(cli.main(["plan", "--storage", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "")
