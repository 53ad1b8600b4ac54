"""Settings that cannot be meant: told before the run, with their key."""

import pytest
import torch

from rayva.recipes import resolve
from tests.recipes.test_recipes import fault


def test_a_json_file_with_a_key_twice_is_refused(tmp_path) -> None:
    config = tmp_path / "my.json"
    config.write_text('{"finetune": {"lr": 1e-4, "epochs": 1, "lr": 2e-4}}')
    assert "not valid JSON: the key 'lr' is given twice" in fault(config=str(config))


def test_text_that_is_no_unicode_is_named_with_its_key() -> None:
    message = fault("data.captions=caf\udce9.csv")
    assert message.startswith("data.captions: the text 'caf\\udce9.csv' is not valid Unicode")
    assert "vision" not in message, "the other settings are not at fault"


@pytest.mark.parametrize("key", ["weights.seed", "pretrain.seed", "finetune.seed"])
def test_a_seed_that_torch_refuses_is_an_error_before_the_run(key: str) -> None:
    for good in (-(2**63), -1, 2**63 - 1):
        torch.manual_seed(good)
        resolve("tiny", None, [f"{key}={good}"])
    assert key in fault(f"{key}={2**64}")


def test_capitals_do_not_hide_the_nearest_key() -> None:
    assert "the nearest is 'finetune.lr'" in fault("finetune.LR=1e-4")
