"""Splicing, the loss over supervised positions, freezing, weights that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rayva.errors import WeightsError
from rayva.model.batch import Batch, ImageCountError, Row, collate, collate_packed, expand_images
from rayva.model.folder import save_projector
from rayva.model.freeze import apply_freeze_policy
from rayva.model.language import load_language_model, load_tokenizer
from rayva.model.projector import build_projector, load_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX

VOCABULARY, HIDDEN, VISION, TOKENS = 50, 32, 6, 3


def _language(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def model() -> VisionLanguageModel:
    language = _language()
    return VisionLanguageModel(language, build_projector("mlp2x_gelu", VISION, HIDDEN))


def _row(text: list[int], images: int, seed: int = 0) -> Row:
    ids = [1, *[IMAGE_TOKEN_INDEX] * images, *text]
    labels = [IGNORE_INDEX] * (1 + images) + text
    ids, labels = expand_images(ids, labels, TOKENS)
    features = torch.randn(images * TOKENS, VISION, generator=torch.Generator().manual_seed(seed))
    return Row(ids, labels, features if images else None)


def test_expansion_repeats_images_and_ignores_their_labels() -> None:
    ids, labels = expand_images([1, IMAGE_TOKEN_INDEX, 5], [1, 7, 5], 3)
    assert ids == [1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 5]
    assert labels == [1, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 5]


def test_places_and_features_must_be_equally_many(model: VisionLanguageModel) -> None:
    with pytest.raises(ImageCountError, match="3 image positions but 2"):
        Row([1, *[IMAGE_TOKEN_INDEX] * 3], [IGNORE_INDEX] * 4, torch.zeros(2, VISION))
    with pytest.raises(ImageCountError, match="0 image positions but 2"):
        Row([1, 2], [1, 2], torch.zeros(2, VISION))
    good = collate([_row([3, 4], images=1)], VISION)
    bad = Batch(good.input_ids_BT, good.labels_BT, good.features_MD[:-1])
    with pytest.raises(ImageCountError):
        model.loss_sum(bad)


def test_rows_in_a_batch_do_not_touch_each_other(model: VisionLanguageModel) -> None:
    rows = [_row([3, 4, 5], 1), _row([6], 0), _row([7, 8], 2, seed=1)]
    together, count = model.loss_sum(collate(rows, VISION))
    apart = [model.loss_sum(collate([row], VISION)) for row in rows]
    assert int(count) == sum(int(number) for _, number in apart) == 6
    torch.testing.assert_close(together, sum(loss for loss, _ in apart), rtol=1e-5, atol=0)


def test_samples_packed_into_a_row_do_not_touch_each_other(model: VisionLanguageModel) -> None:
    """Loss and gradients are those of the samples one by one, whatever stands beside them."""
    model.double()  # sums in another order round differently in single precision
    samples = [
        _row([3, 4, 5], 1),
        _row([6, 9], 0),
        _row([7, 8], 2, seed=1),
        _row([10, 11, 12, 13], 1, seed=2),
    ]
    batch = collate_packed([[samples[3], samples[1], samples[0]], [samples[2]]], VISION)
    assert batch.input_ids_BT.shape[0] == 2
    together, count = model.loss_sum(batch)
    apart = [model.loss_sum(collate([row], VISION)) for row in samples]
    assert int(count) == sum(int(number) for _, number in apart)
    expected = sum(loss for loss, _ in apart)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    for packed, single in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-6)


def test_the_projector_takes_part_without_images(model: VisionLanguageModel) -> None:
    loss, _ = model.loss_sum(collate([_row([3, 4], 0)], VISION))
    loss.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.projector.parameters())
    assert float(model.language.get_input_embeddings().weight.grad.abs().max()) > 0


def test_no_rows_give_a_zero_loss_that_reaches_every_parameter(model: VisionLanguageModel) -> None:
    loss, count = model.loss_sum(collate([], VISION))
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_freeze_policy(model: VisionLanguageModel) -> None:
    projector = sum(p.numel() for p in model.projector.parameters())
    assert apply_freeze_policy(model, "projector") == projector
    assert not any(p.requires_grad for p in model.language.parameters())
    assert apply_freeze_policy(model, "all") == sum(p.numel() for p in model.parameters())


def test_a_saved_language_model_loads_unchanged(tmp_path: Path) -> None:
    language = _language()
    language.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), torch.float32)
    for name, tensor in language.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert load_language_model(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_a_language_model_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        load_language_model(str(tmp_path / "nowhere"), torch.float32)
    with pytest.raises(WeightsError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    folder = tmp_path / "model"
    _language().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="lacks weights"):
        load_language_model(str(folder), torch.float32)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=str(folder)):
        load_language_model(str(folder), torch.float32)


class _Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "was here")


def test_older_weight_files_are_read_as_tensors_alone(tmp_path: Path) -> None:
    language = _language()
    language.config.save_pretrained(tmp_path)
    torch.save(language.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_language_model(str(tmp_path), torch.float32)
    assert torch.equal(loaded.lm_head.weight, language.lm_head.weight)
    torch.save({"lm_head.weight": _Harmful(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_language_model(str(tmp_path), torch.float32)
    assert not (tmp_path / "trace").exists()


def test_a_projector_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "projector.safetensors"
    saved = build_projector("linear", VISION, HIDDEN)
    save_projector(saved.state_dict(), path)
    loaded = build_projector("linear", VISION, HIDDEN)
    load_projector(loaded, path)
    assert torch.equal(loaded.weight, saved.weight)
    with pytest.raises(WeightsError, match="does not fit"):
        load_projector(build_projector("mlp2x_gelu", VISION, HIDDEN), path)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_projector(loaded, path)
