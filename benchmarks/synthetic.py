"""Models of a given shape with random weights, and a seeded set of pictures and conversations.

The time of a step depends on shapes and lengths, not on what weights and words are. Text lengths follow
log-normal distributions in their quantiles (`lengths`), so that a set of any size has the same mean. They are
meant to be like those of LLaVA's data: short captions in stage 1, conversations of some hundred tokens with a
long tail in stage 2. They are no measurement of it; each report tells the lengths that it had.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_support  # puts platform/ on the path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lengths import STAGES, StageName, quantile_lengths
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rayva.data.schema import IMAGES, SAMPLES
from rayva.model.projector import build_projector
from rayva.text.templates import get_template

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
MAX_TOKENS = 2048
_ROUND_TOKENS = 80
_QUESTION_WORDS = 12
_SYSTEM_TOKENS = 40
_DRAWN = 16


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


def add_options(parser: argparse.ArgumentParser, batch: int = 16, micro: int = 8, steps: int = 4) -> None:
    """The options of every script that trains: shapes, sizes, precision."""
    parser.add_argument("--language", choices=list(LANGUAGE_SHAPES), default="smollm2-135m")
    parser.add_argument("--tower", choices=list(TOWER_SHAPES), default="vit-l14-224")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--batch-size", type=int, default=batch, help=f"global batch (default: {batch})")
    parser.add_argument("--micro-batch-size", type=int, default=micro, help=f"samples (default: {micro})")
    parser.add_argument("--steps", type=int, default=steps, help=f"measured steps (default: {steps})")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before those (default: 1)")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile on Rayva's side")
    parser.add_argument("--text-scale", type=float, default=1.0, help="factor on text lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", help="folder for the run (default: the system's temporary folder)")


def run(
    title: str,
    options: argparse.Namespace,
    child: Callable[[dict[str, Any]], None],
    measure: Callable[[argparse.Namespace, Setting], dict[str, Any]],
    body: Callable[[argparse.Namespace, dict[str, Any]], str],
) -> None:
    """A benchmark's main: measures in a folder of its own and reports, or does a child process's part."""
    if options.child:
        child(json.loads(options.child))
        return
    started_on = bench_support.machine()
    with tempfile.TemporaryDirectory(prefix="rayva-bench-", dir=options.scratch) as root:
        figures = measure(options, setting_of(options, root))
    bench_support.report(options, title, body(options, figures), figures, started_on)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked."""
    options = parser.parse_args()
    if options.batch_size % options.micro_batch_size or options.warm_up < 1 or options.steps < 1:
        parser.error("--micro-batch-size must divide --batch-size; --steps and --warm-up are at least 1")
    return options


def stage_changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options change of a stage's settings."""
    return {
        name: getattr(options, name) for name in ("batch_size", "micro_batch_size", "precision", "compile")
    }


def setting_of(options: argparse.Namespace, root: str) -> Setting:
    """The setting that the options describe, with its files under `root`."""
    return Setting(root, options.language, options.tower, options.text_scale, options.seed)


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


def samples_table(setting: Setting, name: str) -> pa.Table:
    """The table of `write_samples`."""
    return pq.read_table(setting.file(f"{name}.parquet"))


def images_table(setting: Setting) -> pa.Table:
    """The table of `write_images`."""
    return pq.read_table(setting.file("images.parquet"))
