"""The lists of instructions, and how one is chosen."""

from __future__ import annotations

from collections import Counter

import pytest

from rayva.text.instructions import BRIEF, DETAILED, choose_instruction


def test_the_lists_have_the_papers_sizes_and_no_duplicates() -> None:
    assert len(set(BRIEF)) == 11
    assert len(set(DETAILED)) == 16
    assert not set(BRIEF) & set(DETAILED)


def test_the_choice_depends_on_seed_and_sample_alone() -> None:
    ids = [f"sample-{index}" for index in range(50)]
    first = [choose_instruction(BRIEF, 7, sample_id) for sample_id in ids]
    assert first == [choose_instruction(BRIEF, 7, sample_id) for sample_id in ids]
    assert first != [choose_instruction(BRIEF, 8, sample_id) for sample_id in ids]


@pytest.mark.parametrize("instructions", [BRIEF, DETAILED])
def test_every_instruction_is_used_about_equally(instructions: tuple[str, ...]) -> None:
    counts = Counter(
        choose_instruction(instructions, 0, str(index)) for index in range(200 * len(instructions))
    )
    assert len(counts) == len(instructions)
    assert all(130 < count < 270 for count in counts.values())
