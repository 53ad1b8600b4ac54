"""Models of a given shape with random weights, and a seeded set of pictures and conversations.

The time of a step depends on shapes and lengths, not on what weights and words are. Lengths follow
log-normal distributions in their quantiles, so that a set of any size has the same mean; the
figures actually reached are part of each report (`describe_lengths`). They are meant to be like those of
LLaVA's data (short captions in stage 1, conversations of some hundred tokens with a long tail in
stage 2), and are no measurement of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import bench_support  # noqa: F401  # puts platform/ on the path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rayva.data.schema import IMAGES, SAMPLES
from rayva.features.shards import ShardWriter, to_float16
from rayva.features.store import FeatureStore, StoreLayout, prepare_store
from rayva.model.projector import build_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Stage
from rayva.storage import Storage
from rayva.text.templates import get_template
from rayva.training.dataset import FeatureReader, SampleSource, StoredFeatures, TextSettings
from rayva.training.inline import InlineFeatures
from rayva.training.loop import Metrics, SavedCheckpoint, TrainJob
from rayva.training.plan import TrainingPlan
from rayva.vision.decode import decode_image
from rayva.vision.towers import VisionTower, load_tower

StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune")

LANGUAGE_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
TOWER_SHAPES: dict[str, dict[str, Any]] = {
    "vit-l14-224": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14,
    },
}  # fmt: skip
TEXT_LENGTHS: dict[StageName, tuple[float, float]] = {"pretrain": (18.0, 0.5), "finetune": (220.0, 0.65)}
"""Median of the text tokens of a sample, and sigma of their logarithm."""
MAX_TOKENS = 2048
_ROUND_TOKENS = 80
_QUESTION_WORDS = 12
_SYSTEM_TOKENS = 40
_DRAWN = 16
_TEMPLATES: dict[StageName, str] = {"pretrain": "plain", "finetune": "v1"}


@dataclass(frozen=True)
class Setting:
    """Which models, and where the files of `prepare` lie."""

    root: str
    language: str = "smollm2-135m"
    tower: str = "vit-l14-224"
    text_scale: float = 1.0
    """What text lengths are multiplied with: small ones make a test quick."""
    seed: int = 0

    def json(self) -> dict[str, Any]:
        """JSON data that `Setting(**data)` takes back."""
        return asdict(self)

    @property
    def image_tokens(self) -> int:
        """N: visual tokens of an image."""
        shape = TOWER_SHAPES[self.tower]
        return int(shape["image_size"] // shape["patch_size"]) ** 2

    def file(self, name: str) -> Path:
        """A file of the set."""
        return Path(self.root) / name


def quantile_lengths(stage: StageName, count: int, scale: float = 1.0) -> list[int]:
    """Text tokens of `count` samples: the distribution's quantiles at (i + 1/2) / count."""
    median, sigma = TEXT_LENGTHS[stage]
    normal = statistics.NormalDist()
    raw = (median * math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [max(6, round(length * scale)) for length in raw]


def describe_lengths(lengths: Sequence[int]) -> str:
    """Mean and quantiles of sample lengths, in words."""
    p10, p50, p90 = np.quantile(lengths, [0.1, 0.5, 0.9])
    quantiles = f"p10 {p10:.0f}, p50 {p50:.0f}, p90 {p90:.0f}, max {max(lengths)}"
    return f"mean {np.mean(lengths):.0f} tokens ({quantiles})"


# --- what is trained on ---


def _words() -> list[str]:
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    rng = random.Random(1)
    return sorted({rng.choice(syllables) + rng.choice(syllables) + rng.choice(syllables) for _ in range(900)})


def make_tokenizer() -> FastTokenizer:
    """Byte-level BPE to which each word of the set is one token."""
    template = get_template("v1", tokenizer=None)
    text = " ".join(_words())
    corpus = [f" {text}", *[f"{template.system} USER: \n ASSISTANT: </s>"] * 50]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    return FastTokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=4096,
    )


def _turns(stage: StageName, tokens: int, rng: random.Random, words: list[str]) -> list[dict[str, str]]:
    def say(count: int) -> str:
        return " ".join(rng.choices(words, k=max(1, count)))

    if stage == "pretrain":
        return [{"role": "human", "text": "<image>\n"}, {"role": "gpt", "text": say(tokens - 3)}]
    spoken = max(8, tokens - _SYSTEM_TOKENS)
    rounds = max(1, round(spoken / _ROUND_TOKENS))
    turns = []
    for number in range(rounds):
        mark = "" if number else "<image>\n"
        question = min(_QUESTION_WORDS, spoken // (2 * rounds))
        turns.append({"role": "human", "text": mark + say(question)})
        turns.append({"role": "gpt", "text": say(spoken // rounds - question - 8)})
    return turns


def write_samples(setting: Setting, stage: StageName, name: str, count: int) -> None:
    """Writes `count` conversations, each with an image of its own, as `name`.parquet."""
    rng = random.Random(f"{setting.seed}/{stage}/{name}")
    words = _words()
    lengths = quantile_lengths(stage, count, setting.text_scale)
    rng.shuffle(lengths)
    rows = [
        {
            "sample_id": f"{name}-{i}",
            "image_ids": [f"image-{i}"],
            "turns": _turns(stage, length, rng, words),
            "kind": "user",
        }
        for i, length in enumerate(lengths)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLES), setting.file(f"{name}.parquet"))


def write_images(setting: Setting, count: int) -> None:
    """Writes `count` JPEG pictures; few are drawn, bytes behind the end of the file make each its own."""
    rng = np.random.default_rng(setting.seed)
    drawn = []
    for _ in range(min(count, _DRAWN)):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        sink = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
        drawn.append(sink.getvalue())
    rows = [
        {
            "image_id": f"image-{i}",
            "split": "train",
            "content": drawn[i % len(drawn)] + i.to_bytes(8, "big"),
            "captions": [],
            "instances": [],
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES), setting.file("images.parquet"))


def write_models(setting: Setting) -> None:
    """Writes the tokenizer, and the vision tower in Hugging Face's format."""
    make_tokenizer().save_pretrained(setting.file("tokenizer"))
    folder = setting.file("vision")
    vision_model(setting).save_pretrained(folder)
    side = TOWER_SHAPES[setting.tower]["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def load_tokenizer(setting: Setting) -> FastTokenizer:
    """The tokenizer of `write_models`."""
    return FastTokenizer.from_pretrained(setting.file("tokenizer"))


# --- models ---


def vision_model(setting: Setting) -> CLIPVisionModel:
    """The tower; equal in every process."""
    torch.manual_seed(setting.seed + 1)
    return CLIPVisionModel(CLIPVisionConfig(**TOWER_SHAPES[setting.tower]))


def language_model(setting: Setting) -> LlamaForCausalLM:
    """The language model; equal in every process."""
    torch.manual_seed(setting.seed + 2)
    config = LlamaConfig(
        **LANGUAGE_SHAPES[setting.language], tie_word_embeddings=True, max_position_embeddings=4096
    )
    return LlamaForCausalLM(config)


def projector_of(setting: Setting) -> torch.nn.Module:
    """The two-layer projector that Hugging Face's LLaVA has; equal in every process."""
    torch.manual_seed(setting.seed + 3)
    vision, text = TOWER_SHAPES[setting.tower], LANGUAGE_SHAPES[setting.language]
    return build_projector("mlp2x_gelu", vision["hidden_size"], text["hidden_size"])


def tower_of(setting: Setting, dtype: torch.dtype) -> VisionTower:
    """The tower as Rayva loads it."""
    return load_tower(str(setting.file("vision")), "clip", -2, device="cpu", dtype=dtype)


# --- Rayva's side ---


def samples_table(setting: Setting, name: str) -> pa.Table:
    """The table of `write_samples`."""
    return pq.read_table(setting.file(f"{name}.parquet"))


def images_table(setting: Setting) -> pa.Table:
    """The table of `write_images`."""
    return pq.read_table(setting.file("images.parquet"))


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
    return {"store": layout.rel, "images": len(contents), "images_per_second": len(contents) / seconds}


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
    model = VisionLanguageModel(language_model(setting), projector_of(setting))
    plan = make_plan(len(source), stage, name)
    return TrainJob(model, source, plan, stage, torch.device("cpu"), name)


@dataclass
class FolderCheckpoint:
    """A checkpoint in a local folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def open(self) -> AbstractContextManager[Path]:
        return nullcontext(self.folder)


@dataclass
class TimedHooks:
    """Keeps the moment and the metrics of every step; checkpoints become folders under `root`."""

    root: Path | None = None
    moments: list[float] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        self.moments.append(time.perf_counter())
        self.metrics.append(dict(metrics))
        self.steps.append(step)

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        assert self.root is not None
        target = self.root / f"checkpoint-{step:08d}"
        scratch = self.root / f".{target.name}"
        for source in [path for path in folder.rglob("*") if path.is_file()]:
            destination = scratch / source.relative_to(folder)
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(source.read_bytes())
        scratch.rename(target)

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        if self.root is None:
            return []
        return [FolderCheckpoint(folder) for folder in sorted(self.root.glob("checkpoint-*"), reverse=True)]

    def seconds(self, warm_up: int) -> float:
        """Time of all steps after the first `warm_up`."""
        return self.moments[-1] - self.moments[warm_up - 1]
