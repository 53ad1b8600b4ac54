"""Progress lines: what, how far, how fast, how long still."""

import pytest

from rayva import progress
from rayva.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_line_has_count_rate_rest_and_figures(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("pretrain", 200, "steps", done=40)
    clock.now += 10
    bar.advance(20, loss=0.41237)
    said = capsys.readouterr().err
    # 20 steps in 10 s: those done before do not count; 140 are left.
    assert said == "  pretrain: 60/200 steps (30 %), 2.0 steps/s, 1 min 10 s left, loss 0.4124\n"


def test_lines_are_seconds_apart(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("features", None, "images")
    for _ in range(100):
        clock.now += 0.5
        bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 10
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "  features: 100 images, 2.0 images/s, took 50 s\n"


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with Progress("x", 1, "steps") as bar:
        bar.advance()
    progress.say("x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (45, "45 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
