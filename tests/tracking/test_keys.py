from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from rayva.tracking.keys import with_clean_keys


@given(st.lists(st.text(min_size=1, max_size=300), unique=True, max_size=5))
@example(["a+b", "a(b", "a_b 2", "a_b"])
@example(["../a", "/a", "a//b", "a/", ".", "..b - a"])
@example(["x" * 300, "x" * 299])
def test_mlflow_takes_every_name_and_none_is_lost(names: list[str]) -> None:
    found = with_clean_keys({name: number for number, name in enumerate(names)})
    for key in found:
        _validate_metric_name(key)
        _validate_param_name(key)
        assert len(key) <= 250
    assert list(found.values()) == list(range(len(names)))


def test_names_that_are_taken_stay_as_they_are() -> None:
    names = ["b - a/vqa/accuracy/low", "run.llava-1.5", "m\u00fcller: x"]
    assert list(with_clean_keys(dict.fromkeys(names, 1.0))) == names
