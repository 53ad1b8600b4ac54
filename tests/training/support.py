"""A tiny model, samples and features, made on the spot: the same in every process."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayva.data.schema import SAMPLES, ImageRecord
from rayva.instruct import scene_data
from rayva.model.projector import build_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Data, Stage
from rayva.text.templates import get_template
from rayva.training.checkpoint import DamagedCheckpointError, Progress, read_progress
from rayva.training.dataset import SampleSource, TextSettings
from rayva.training.loop import TrainJob
from rayva.training.plan import TrainingPlan
from rayva.training.resume import Metrics, SavedCheckpoint

WORDS = ["red", "blue", "circle", "square", "what", "is", "left", "right", "of", "the", "a", "two", "three"]
TOKENS_PER_IMAGE, VISION_HIDDEN, TEXT_HIDDEN = 4, 6, 32


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def tiny_model(kind: str = "linear", vision_hidden: int = VISION_HIDDEN) -> VisionLanguageModel:
    """A Llama of two layers with a projector, from a fixed seed."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=TEXT_HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return VisionLanguageModel(LlamaForCausalLM(config), build_projector(kind, vision_hidden, TEXT_HIDDEN))


def tiny_samples(count: int) -> pa.Table:
    """Conversations of one or two rounds; most have an image, some two, some none."""
    rng = random.Random(3)
    rows = []
    for index in range(count):
        images = [f"image{rng.randrange(8)}" for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        turns = []
        for position in range(rng.choice([1, 1, 2])):
            marks = "<image>\n" * len(images) if position == 0 else ""
            turns.append({"role": "human", "text": marks + " ".join(rng.choices(WORDS, k=3))})
            turns.append({"role": "gpt", "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 5)))})
        rows.append({"sample_id": f"s{index}", "image_ids": images, "turns": turns, "kind": "user"})
    return pa.Table.from_pylist(rows, schema=SAMPLES)


class TinyFeatures:
    """Features of image<n>, from its number."""

    num_tokens = TOKENS_PER_IMAGE
    encodes = False

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        return [self._one(int(image_id.removeprefix("image"))) for image_id in image_ids]

    def _one(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(TOKENS_PER_IMAGE, VISION_HIDDEN, generator=generator)


def tiny_source(count: int = 30, **settings: Any) -> SampleSource:
    """Samples of `tiny_samples` with features of `TinyFeatures`."""
    tokenizer = tiny_tokenizer()
    text = TextSettings(get_template("v1", tokenizer=tokenizer, system=""), **settings)
    known = pa.array([f"image{i}" for i in range(8)])
    return SampleSource(tiny_samples(count), known, TinyFeatures(), text, tokenizer)


def tiny_job(count: int = 30, epochs: float = 1.0, **settings: Any) -> TrainJob:
    """A job over `tiny_source`; `settings` are of the stage."""
    defaults: dict[str, Any] = {
        "train": "all", "lr": 1e-2, "batch_size": 8, "micro_batch_size": 4, "precision": "float32",
        "epochs": epochs, "checkpoint_every": 3,
    }  # fmt: skip
    stage = Stage(**(defaults | settings))
    plan = TrainingPlan(count, stage.batch_size, stage.epochs, stage.seed, "tiny")
    return TrainJob(tiny_model(), tiny_source(count), plan, stage, torch.device("cpu"), "job")


class PixelFeatures:
    """Features of drawn scenes: the mean colours of a 4 x 4 grid's cells, each in quarters."""

    num_tokens, hidden = 16, 12
    encodes = False

    def __init__(self, images: Iterable[ImageRecord]) -> None:
        self._features = {image.image_id: self._pool(image) for image in images}

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        return [self._features[image_id] for image_id in image_ids]

    def _pool(self, image: ImageRecord) -> Tensor:
        assert image.content is not None
        picture = Image.open(io.BytesIO(image.content)).convert("RGB").resize((8, 8), Image.Resampling.BOX)
        pixels_HWC = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
        cells = pixels_HWC.reshape(4, 2, 4, 2, 3).permute(0, 2, 1, 3, 4)
        return cells.reshape(self.num_tokens, self.hidden)


def scenes_job(steps: int, **settings: Any) -> TrainJob:
    """A job of `steps` steps over the built-in scenes: real pictures, questions and answers."""
    stage = Stage(**({"train": "all", "precision": "float32"} | settings))
    count = 40 * stage.batch_size
    data = Data(source="scenes", seed=5, train_scenes=count, samples_per_image=1, questions_per_sample=1)
    bundle = scene_data.build(data)
    rows = [asdict(sample) for sample in bundle.finetune]
    samples = pa.Table.from_pylist(rows, schema=SAMPLES)
    features = PixelFeatures(image for image in bundle.images if image.split == "train")
    tokenizer = tiny_tokenizer()
    text = TextSettings(get_template("v1", tokenizer=tokenizer, system=""), max_tokens=256)
    known = pa.array([f"scene-train-{i:06d}" for i in range(count)])
    source = SampleSource(samples, known, features, text, tokenizer)
    plan = TrainingPlan(len(source), stage.batch_size, steps * stage.batch_size / len(source), 0, "scenes")
    assert plan.steps_total == steps
    model = tiny_model("mlp2x_gelu", PixelFeatures.hidden)
    return TrainJob(model, source, plan, stage, torch.device("cpu"), "scenes")


@dataclass
class FolderCheckpoint:
    """A checkpoint in a local folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def progress(self) -> Progress | None:
        try:
            return read_progress(self.folder)
        except DamagedCheckpointError:
            return None

    def open(self) -> AbstractContextManager[Path]:
        return nullcontext(self.folder)


@dataclass
class FolderHooks:
    """Keeps every metric, and checkpoints as folders; can raise after a step, as a crash would."""

    root: Path
    stop_after: int | None = None
    metrics: list[Metrics] = field(default_factory=list)

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        self.metrics.append(metrics)
        if step == self.stop_after:
            raise InterruptedError(f"stopped after step {step}")

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        target = self.root / f"checkpoint-{step:08d}"
        for source in [path for path in folder.rglob("*") if path.is_file()]:
            destination = target / source.relative_to(folder)
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(source.read_bytes())

    def leaving(self) -> bool:
        return False

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        return [FolderCheckpoint(folder) for folder in sorted(self.root.glob("checkpoint-*"), reverse=True)]


def state_bytes(model: VisionLanguageModel) -> dict[str, bytes]:
    """Weights as bytes, to compare bit by bit."""
    state = model.state_dict().items()
    return {name: t.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, t in state}
