"""Rayva's side of a comparison: its feature store, its samples, its training loop, and a clock."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from lengths import StageName
from synthetic import (
    MAX_TOKENS,
    TOWER_SHAPES,
    Setting,
    images_table,
    load_tokenizer,
    samples_table,
)

from rayva.features.shards import ShardWriter, to_float16
from rayva.features.store import FeatureStore, StoreLayout, prepare_store
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Stage
from rayva.storage import Storage
from rayva.text.templates import get_template
from rayva.training.dataset import FeatureReader, SampleSource, StoredFeatures, TextSettings
from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.inline import InlineFeatures
from rayva.training.loop import TrainJob, train
from rayva.training.plan import TrainingPlan
from rayva.training.resume import Metrics, SavedCheckpoint
from rayva.training.store import CheckpointStore
from rayva.vision.decode import decode_image
from rayva.vision.towers import VisionTower, load_tower

_TEMPLATES: dict[StageName, str] = {"pretrain": "plain", "finetune": "v1"}


def tower_of(setting: Setting, dtype: torch.dtype) -> VisionTower:
    """The tower as Rayva loads it."""
    return load_tower(str(setting.file("vision")), "clip", -2, device="cpu", dtype=dtype)


def encode_images(
    setting: Setting, storage_root: str, dtype: torch.dtype, count: int, batch: int = 16
) -> dict[str, Any]:
    """Encodes the first `count` images into a feature store under `storage_root`, and times it.

    The time covers decoding, encoding and writing; the first batch is encoded once more beforehand, untimed.
    """
    storage = Storage(storage_root)
    tower = tower_of(setting, dtype)
    layout = StoreLayout(
        tower.num_tokens, tower.hidden_size, tower.describe(), str(dtype).removeprefix("torch.")
    )
    prepare_store(storage, layout)
    contents = images_table(setting)["content"][:count].to_pylist()
    tower.encode(tower.preprocess([decode_image(data) for data in contents[:batch]]))
    started = time.perf_counter()
    with ShardWriter(storage, layout.rel, tower.num_tokens, tower.hidden_size, 2048) as writer:
        for start in range(0, len(contents), batch):
            part = contents[start : start + batch]
            keys = [hashlib.sha256(data).hexdigest() for data in part]
            features_BND = tower.encode(tower.preprocess([decode_image(data) for data in part]))
            writer.write(keys, to_float16(features_BND.float().numpy(), keys))
    seconds = time.perf_counter() - started
    return {
        "store": layout.rel,
        "images": len(contents),
        "images_per_second": len(contents) / seconds,
        "bytes_per_image": tower.num_tokens * tower.hidden_size * 2,
    }


def write_random_store(setting: Setting, storage_root: str, count: int) -> dict[str, Any]:
    """A store of random features for the first `count` images: reading them takes as long as real ones."""
    storage = Storage(storage_root)
    tokens, hidden = setting.image_tokens, TOWER_SHAPES[setting.tower]["hidden_size"]
    layout = StoreLayout(tokens, hidden, {"random": setting.seed}, "float32")
    prepare_store(storage, layout)
    rng = np.random.default_rng(setting.seed)
    with ShardWriter(storage, layout.rel, tokens, hidden, 2048) as writer:
        for data in images_table(setting)["content"][:count].to_pylist():
            key = hashlib.sha256(data).hexdigest()
            writer.write([key], rng.standard_normal((1, tokens, hidden), np.float32).astype(np.float16))
    return {"store": layout.rel, "images": count, "bytes_per_image": tokens * hidden * 2}


def stored_features(setting: Setting, storage_root: str, store: str) -> StoredFeatures:
    """Reads the features of `encode_images`."""
    opened = FeatureStore.open(Storage(storage_root), store)
    images = images_table(setting)
    contents = zip(images["image_id"].to_pylist(), images["content"].to_pylist(), strict=True)
    keys = {image_id: hashlib.sha256(data).hexdigest() for image_id, data in contents}
    return StoredFeatures(opened.read, keys, setting.image_tokens)


def inline_features(setting: Setting, dtype: torch.dtype) -> InlineFeatures:
    """Encodes when a batch needs it, with the limits of the default recipe."""
    return InlineFeatures(images_table(setting), tower_of(setting, dtype), 89_478_485, 64 * 2**20)


def source_of(setting: Setting, stage: StageName, name: str, features: FeatureReader) -> SampleSource:
    """The samples of a table of `write_samples`, as the training loop takes them."""
    tokenizer = load_tokenizer(setting)
    text = TextSettings(get_template(_TEMPLATES[stage], tokenizer=tokenizer), max_tokens=MAX_TOKENS)
    known = images_table(setting)["image_id"].combine_chunks()
    return SampleSource(samples_table(setting, name), known, features, text, tokenizer)


class NoFeatures:
    """Stands in where only the text of samples is wanted."""

    encodes = False

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def read(self, image_ids: Sequence[str]) -> list[torch.Tensor]:
        """Refuses: nobody should ask."""
        raise NotImplementedError("there are no features")


def sample_lengths(setting: Setting, stage: StageName, name: str) -> list[int]:
    """Tokens of every sample of a table, image tokens included."""
    source = source_of(setting, stage, name, NoFeatures(setting.image_tokens))
    counts: Counter[str] = Counter()
    examples = [source.example(index, 0, counts) for index in range(len(source))]
    return [len(example.input_ids) for example in examples if example is not None]


def stage_settings(stage: StageName, **changes: Any) -> Stage:
    """A stage with the paper's learning rates, without warm-up: every step of a short run counts."""
    common: dict[str, Any] = {"warmup_ratio": 0.0, "checkpoint_every": 10**9}
    own = {"pretrain": {"train": "projector", "lr": 2e-3}, "finetune": {"train": "all", "lr": 2e-5}}
    return Stage(**(common | own[stage] | changes))


def make_plan(samples: int, stage: Stage, name: str) -> TrainingPlan:
    """The plan that all sides of a comparison follow."""
    return TrainingPlan(samples, stage.batch_size, stage.epochs, stage.seed, name)


def make_job(
    setting: Setting, stage: Stage, source: SampleSource, name: str, digest: str = "bench"
) -> TrainJob:
    """A job of the training loop over the whole of `source`."""
    model = VisionLanguageModel(synthetic.language_model(setting), synthetic.projector_of(setting))
    plan = make_plan(len(source), stage, name)
    return TrainJob(model, source, plan, stage, torch.device("cpu"), name)


@dataclass
class TimedHooks:
    """Keeps the moment and the metrics of every step; checkpoints lie in `store`, if there is one."""

    store: CheckpointStore | None = None
    moments: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        self.moments.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.metrics.append(dict(metrics))
        self.steps.append(step)

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        assert self.store is not None
        self.store.put(folder, step)

    def leaving(self) -> bool:
        return False

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        return [] if self.store is None else self.store.checkpoints()

    def seconds(self, warm_up: int) -> float:
        """Time of all steps after the first `warm_up`."""
        return self.moments[-1] - self.moments[warm_up - 1]


def train_timed(
    setting: Setting, stage: Stage, source: SampleSource, name: str, warm_up: int
) -> dict[str, Any]:
    """Trains on the whole of `source`; time and figures are those of the steps after the first `warm_up`."""
    init_distributed(torch.device("cpu"))
    hooks = TimedHooks()
    result = train(make_job(setting, stage, source, name), hooks)
    leave_distributed()
    return figures_of(hooks, warm_up) | {"precision": result.precision}


def figures_of(hooks: TimedHooks, warm_up: int) -> dict[str, Any]:
    """What the steps after the first `warm_up` took; the losses are those of all steps."""
    measured = hooks.metrics[warm_up:]
    seconds = sum(metrics["seconds"] for metrics in measured)
    return {
        "seconds": hooks.seconds(warm_up),
        "cpu_seconds": hooks.cpu[-1] - hooks.cpu[warm_up - 1],
        "steps": len(measured),
        "losses": [metrics["loss"] for metrics in hooks.metrics],
        "padding": float(np.mean([metrics["padding_share"] for metrics in measured])),
        "wait_share": sum(metrics["wait_share"] * metrics["seconds"] for metrics in measured) / seconds,
    }
