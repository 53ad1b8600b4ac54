"""The built-in base models: trained, saved in Hugging Face format, and resumed to the very same weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayva.recipes.schema import Weights
from rayva.storage import Storage
from rayva.training import base_weights
from rayva.vision.towers import load_tower

WEIGHTS = Weights(clip_steps=4, clip_batch_size=8, language_steps=4, language_batch_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> base_weights.PreTrainedTokenizerFast:
    return base_weights.train_tokenizer(0)


def test_any_text_survives_the_tokenizer(tokenizer: base_weights.PreTrainedTokenizerFast) -> None:
    for text in ("What color is the circle?", "Größe 漢字 \t\n end", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("make", [base_weights.clip_trainee, base_weights.language_trainee])
def test_killed_training_ends_with_the_same_weights(
    make: object,
    tokenizer: base_weights.PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_weights, "_CHECKPOINT_STEPS", 2)
    storage = Storage(str(tmp_path))
    whole = make(tokenizer, WEIGHTS, 0)  # type: ignore[operator]
    whole_loss = base_weights.fit(whole, storage, "whole.pt")

    class Killed(Exception):
        pass

    broken = make(tokenizer, WEIGHTS, 0)  # type: ignore[operator]
    usual = broken.loss

    def dying(step: int) -> torch.Tensor:
        if step == 3:
            raise Killed
        return usual(step)

    broken.loss = dying
    with pytest.raises(Killed):
        base_weights.fit(broken, storage, "broken.pt")
    resumed = make(tokenizer, WEIGHTS, 0)  # type: ignore[operator]
    assert base_weights.fit(resumed, storage, "broken.pt") == whole_loss
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_saved_models_load_like_any_other(
    tokenizer: base_weights.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path))
    clip = base_weights.clip_trainee(tokenizer, WEIGHTS, 0).model
    base_weights.save_clip(clip, tokenizer, storage, "vision")  # type: ignore[arg-type]
    tower = load_tower(str(tmp_path / "vision"), "clip", -2, None, "square")
    assert (tower.num_tokens, tower.hidden_size) == (9, 128)
    language = base_weights.language_trainee(tokenizer, WEIGHTS, 0).model
    base_weights.save_language_model(language, tokenizer, storage, "language")  # type: ignore[arg-type]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "language", dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "language").encode("a red circle")])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, language(ids).logits)
