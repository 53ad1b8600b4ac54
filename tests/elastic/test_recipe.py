"""`scaling.workers` as a number or as [least, most]."""

from __future__ import annotations

import pytest

from rayva.errors import RecipeError, StorageError
from rayva.orchestration.training import may_pass
from rayva.recipes.load import from_dict, resolve, to_dict
from rayva.recipes.schema import Scaling
from rayva.storage import Storage


@pytest.mark.parametrize(
    ("given", "workers", "least", "most"),
    [("2", 2, 2, 2), ("[1,2]", (1, 2), 1, 2), ("[1, 8]", (1, 8), 1, 8), ("[3,3]", 3, 3, 3)],
)
def test_a_number_or_two_bounds(given: str, workers: object, least: int, most: int) -> None:
    recipe = resolve("tiny", None, [f"scaling.workers={given}"])
    assert recipe.scaling.workers == workers
    assert (recipe.scaling.min_workers, recipe.scaling.max_workers) == (least, most)
    assert from_dict(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    "given", ["0", "[0,2]", "[2,1]", "[1]", "[1,2,3]", "1.5", "two", "true", "[1,x]", "null"]
)
def test_anything_else_is_told(given: str) -> None:
    with pytest.raises(RecipeError, match=r"scaling\.workers: expected .*\[least, most\]"):
        resolve("tiny", None, [f"scaling.workers={given}"])


def test_in_python_too() -> None:
    assert Scaling(workers=(1, 4)).max_workers == 4
    assert Scaling(workers=3).min_workers == 3


def test_workers_are_started_anew_where_a_storage_may_answer_again() -> None:
    away = StorageError("s3://b/x cannot be used: Could not connect", "see that it answers")
    assert may_pass(away, Storage("memory://run"))
    assert not may_pass(away, Storage("/tmp"))
    assert not may_pass(RecipeError("finetune.lr is wrong", "mend it"), Storage("memory://run"))
