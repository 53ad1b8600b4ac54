"""A storage root on which the steps before training are finished, with tiny weights and data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rayva.features.shards import ShardWriter
from rayva.features.store import StoreLayout, prepare_store
from rayva.model.folder import save_projector
from rayva.orchestration.pipeline import StepContext
from rayva.recipes.schema import Conversation, Recipe, Scaling, Stage, Vision
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from rayva.vision.towers import describe_tower
from tests.training.support import tiny_model, tiny_samples, tiny_tokenizer

SIDE, PATCH, HIDDEN = 28, 14, 6
IMAGES = [f"image{number}" for number in range(8)]


@dataclass
class RecordingTracker:
    """Takes metrics as the job's tracker does."""

    steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def metrics_many(self, rows: Iterable[tuple[int, dict[str, float]]]) -> None:
        self.steps.extend(rows)


def tiny_recipe(workers: int = 1, **stage: Any) -> Recipe:
    """A recipe over the inputs of `finished_inputs`."""
    common = {
        "lr": 1e-2,
        "epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "precision": "float32",
        "checkpoint_every": 4,
    } | stage
    lora = common.pop("lora", {})
    return Recipe(
        name="test",
        vision=Vision(path="vision", image_size=SIDE),
        conversation=Conversation(template="v1", pretrain_template="plain", system="", max_tokens=64),
        pretrain=Stage(train="projector", **common),
        finetune=Stage(train="all", lora=lora, **common),
        scaling=Scaling(workers=workers, cpus_per_worker=1, max_failures=1),
    )


def step_folder(storage: Storage, name: str) -> StepFolder:
    """A step's folder, whatever its settings and inputs."""
    folder = StepFolder(storage, name, step_digest(name, {}, {}))
    storage.makedirs(folder.rel)
    return folder


def _weights(storage: Storage) -> StepFolder:
    folder = step_folder(storage, "weights")
    root = Path(storage.path(folder.rel))
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    clip.save_pretrained(root / "vision")
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    processor.save_pretrained(root / "vision")
    tiny_model().language.save_pretrained(root / "language")
    tiny_tokenizer().save_pretrained(root / "language")
    folder.finish({part: {"path": part, "revision": None} for part in ("vision", "language")}, {}, 0)
    return folder


def _features(storage: Storage, weights: StepFolder) -> StepFolder:
    folder = step_folder(storage, "features")
    tower = describe_tower(storage.path(weights.join("vision")), "clip", -2, SIDE)
    layout = StoreLayout(tower.num_tokens, tower.hidden_size, tower.describe(), "float32")
    prepare_store(storage, layout)
    keys = [hashlib.sha256(image_id.encode()).hexdigest() for image_id in IMAGES]
    values = np.random.default_rng(0).normal(size=(len(keys), tower.num_tokens, HIDDEN)).astype(np.float16)
    with ShardWriter(storage, layout.rel, tower.num_tokens, HIDDEN, 100) as writer:
        writer.write(keys, values)
    pq.write_table(
        pa.table({"image_id": IMAGES, "key": keys}), storage.path(folder.join("image_keys.parquet"))
    )
    folder.finish({"store": layout.rel, "tokens": tower.num_tokens, "hidden": HIDDEN}, {}, 0)
    return folder


def finished_inputs(storage: Storage, samples: int) -> dict[str, StepFolder]:
    """The finished steps weights, data and features; both stages have the same samples."""
    weights = _weights(storage)
    data = step_folder(storage, "data")
    for stage in ("pretrain", "finetune"):
        pq.write_table(tiny_samples(samples), storage.path(data.join(f"{stage}.parquet")))
    data.finish({}, {}, 0)
    return {"weights": weights, "data": data, "features": _features(storage, weights)}


def context(
    storage: Storage, recipe: Recipe, name: str, inputs: dict[str, StepFolder], tracker: RecordingTracker
) -> StepContext:
    """The context of a training step."""
    return StepContext(recipe, storage, step_folder(storage, name), inputs, tracker)  # type: ignore[arg-type]


def pretrained(storage: Storage) -> StepFolder:
    """A finished stage 1: the tiny model's own projector."""
    folder = step_folder(storage, "pretrain")
    state = tiny_model().projector.state_dict()
    save_projector(state, Path(storage.path(folder.join("projector.safetensors"))))
    folder.finish({}, {}, 0)
    return folder
