"""Splicing, logits, losses and gradients equal those of the original code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rayva.model.batch import Batch, Row, collate, expand_images
from rayva.model.generate import Sampling, generate_ids
from rayva.model.projector import build_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.text.encode import IGNORE_INDEX
from tests.reference import NUMERICS, needs

CASES = ["single_image_middle", "image_first", "batch_right_pad"]
TOLERANCE = 1e-4

pytestmark = needs(NUMERICS)


@pytest.fixture
def original() -> VisionLanguageModel:
    """The tiny model of the original's checkpoint: model.mm_projector.* beside the language model's names."""
    folder = NUMERICS / "llava_checkpoint"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    language = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in config if not k.startswith("mm_")}))
    others = ("mm_projector", "vision_tower")
    own = {name: t for name, t in weights.items() if not any(other in name for other in others)}
    language.load_state_dict(own, strict=True)
    projector = build_projector("linear", config["mm_hidden_size"], config["hidden_size"])
    prefix = "model.mm_projector."
    projector.load_state_dict({n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)})
    return VisionLanguageModel(language, projector)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(NUMERICS / "tensors.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((NUMERICS / "cases.json").read_text())


def _batch(name: str, tensors: dict[str, Tensor], images: list[int]) -> Batch:
    features = tensors["clip_hidden_minus2_patch"]
    rows, remaining = [], list(images)
    for ids, labels, mask in zip(
        tensors[f"{name}.input_ids"],
        tensors[f"{name}.labels"],
        tensors[f"{name}.attention_mask"],
        strict=True,
    ):
        kept = mask.bool()
        tokens = features.shape[1]
        expanded, expanded_labels = expand_images(ids[kept].tolist(), labels[kept].tolist(), tokens)
        count = int((ids[kept] == -200).sum())
        own, remaining = remaining[:count], remaining[count:]
        rows.append(Row(expanded, expanded_labels, torch.cat([features[i] for i in own]) if own else None))
    return collate(rows, features.shape[2])


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(
    name: str, original: VisionLanguageModel, tensors: dict[str, Tensor], cases: dict[str, Any]
) -> None:
    batch = _batch(name, tensors, cases[name]["images"])
    valid = tensors[f"{name}.expanded_attention_mask"].bool()
    assert torch.equal(batch.labels_BT, tensors[f"{name}.expanded_labels"])

    embeds = original.embed(batch)
    torch.testing.assert_close(embeds[valid], tensors[f"{name}.inputs_embeds"][valid], atol=TOLERANCE, rtol=0)
    logits = original.language.get_output_embeddings()(original.forward_hidden(batch))
    torch.testing.assert_close(logits[valid], tensors[f"{name}.logits"][valid], atol=TOLERANCE, rtol=0)

    total, count = original.loss_sum(batch)
    assert int(count) == cases[name]["n_supervised"]
    loss = total / count
    assert loss.item() == pytest.approx(cases[name]["loss"], abs=TOLERANCE)
    loss.backward()
    projector = original.projector
    for parameter in ("weight", "bias"):
        torch.testing.assert_close(
            getattr(projector, parameter).grad,
            tensors[f"{name}.grad_projector_{parameter}"],
            atol=TOLERANCE,
            rtol=0,
        )
    head = original.language.get_output_embeddings().weight.grad
    assert float(head.norm()) == pytest.approx(cases[name]["grad_norm_lm_head"], abs=TOLERANCE)
    table = original.language.get_input_embeddings().weight.grad
    assert float(table.norm()) == pytest.approx(cases[name]["grad_norm_embed"], abs=TOLERANCE)


def test_projected_features_equal_the_originals(
    original: VisionLanguageModel, tensors: dict[str, Tensor]
) -> None:
    projected = original.projector(tensors["clip_hidden_minus2_patch"])
    torch.testing.assert_close(projected, tensors["image_features_projected"], atol=TOLERANCE, rtol=0)


def test_generates_what_the_original_generates(
    original: VisionLanguageModel, tensors: dict[str, Tensor]
) -> None:
    features = tensors["clip_hidden_minus2_patch"]
    expected = tensors["generate.output_ids"][0].tolist()[1:]  # the first is the BOS that generate() put in
    ids, labels = expand_images(tensors["generate.input_ids"][0].tolist(), None, features.shape[1])
    assert set(labels) == {IGNORE_INDEX}
    batch = collate([Row(ids, labels, features[0])], features.shape[2], left=True)
    produced = generate_ids(original, batch, Sampling(max_new_tokens=len(expected)))
    assert produced == [expected]
