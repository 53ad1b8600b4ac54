from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.evaluation.score import is_right, normalise, wilson
from rayva.evaluation.tasks.vqa import answer_kind


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("A red circle.", "red circle"),
        ("the Red   circle!", "red circle"),
        ("Yes", "yes."),
        ("check-in", "check in"),
        ("\uff32ed", "red"),  # a full-width R
        ("STRASSE", "stra\u00dfe"),
        ("#", "#"),
        ("-5.", "\u22125"),
        ("\u20135", "-5"),
        ("(-5)", "-5"),
        ("3-5", "3 5"),
        ("COVID-19", "covid 19"),
        ("A.", "A"),
        ("(A)", "A"),
        ("a", "A)"),
    ],
)
def test_case_punctuation_articles_and_width_do_not_matter(answer: str, accepted: str) -> None:
    assert is_right(answer, [accepted])


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("red", "red circle"),
        ("not red", "red"),
        ("", ""),
        ("", "red"),
        ("#", "*"),
        ("1", "2"),
        (".", "red"),
        ("-5", "5"),
        ("5", "-5"),
        ("x = -5", "x = 5"),
        ("-0.5", "0.5"),
        ("from -3 to -5", "from 3 to 5"),
        ("A.", "B"),
        ("A.", "the"),
    ],
)
def test_other_answers_are_wrong(answer: str, accepted: str) -> None:
    assert not is_right(answer, [accepted])


@pytest.mark.parametrize(
    ("reference", "kind"),
    [("-5", "number"), ("5.", "number"), ("1,200", "number"), ("No", "yes_no"), ("-", "other")],
)
def test_kinds_of_answers(reference: str, kind: str) -> None:
    assert answer_kind(reference) == kind


def test_any_of_the_accepted_answers_will_do() -> None:
    assert is_right("7", ["seven", "7"])
    assert not is_right("7", [])


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_wilson_gives_the_published_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_the_share(counts: tuple[int, int]) -> None:
    right, total = counts
    low, high = wilson(right, total)
    assert 0 <= low <= right / total + 1e-12
    assert right / total - 1e-12 <= high <= 1
