"""Evaluation against a loop of `generate`, one question at a time, on the same machine, in the same run.

Both ask the same model the same questions about the same pictures, greedily in fp32, and must give the same
answers. The loop has all cores to itself and its model loaded; the evaluation's time is the whole of it: its
replicas start, load the model, answer in batches, and keep every answer on the disk. Ray itself is started
before, as a job does once.

    python benchmarks/evaluate.py --questions 192
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform")]
os.environ["PYTHONPATH"] = str(ROOT / "platform")

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from rayva.evaluation.answers import AnswerStore, Asked, Sampled, asked  # noqa: E402
from rayva.evaluation.tasks.base import Item, Picture, ask  # noqa: E402
from rayva.model.folder import (  # noqa: E402
    ConversationSettings,
    ModelSettings,
    VisionSettings,
    load_assistant,
)
from rayva.model.projector import build_projector  # noqa: E402
from rayva.orchestration.answering import Replicas, answer_all  # noqa: E402
from rayva.provenance import code_version  # noqa: E402
from rayva.storage import Storage  # noqa: E402
from rayva.vision.architecture import read_spec  # noqa: E402
from rayva.vision.decode import decode_image  # noqa: E402
from rayva.vision.towers import describe_tower  # noqa: E402
from rayva.vision.vit import GridVit  # noqa: E402

TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_hidden_layers": 6,
         "patch_size": 32}  # fmt: skip
WORDS = ["what", "colour", "shape", "is", "the", "large", "small", "red", "green", "blue", "cup", "left",
         "right", "of", "behind", "near", "picture"]  # fmt: skip


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="rayva-bench-", dir=options.scratch) as root:
        folder = Path(options.model) if options.model else make_model(Path(root), options)
        questions = make_questions(Path(root), options)
        alone, seconds_alone = one_at_a_time(folder, questions)
        together, seconds_together = evaluation(folder, questions, Path(root), options)
    differ = sum(alone[key] != together[key] for key in alone)
    print(json.dumps(_report(options, questions, seconds_alone, seconds_together, differ), indent=1))
    if differ:
        raise SystemExit(f"{differ} of {len(alone)} answers differ")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: one with random weights is made)")
    parser.add_argument("--layers", type=int, default=12, help="of the random language model (12)")
    parser.add_argument("--width", type=int, default=576, help="of the random language model (576)")
    parser.add_argument("--questions", type=int, default=192)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus-per-replica", type=float, default=float(os.cpu_count() or 1))
    parser.add_argument("--scratch", help="folder for the run (default: the system's temporary folder)")
    return parser.parse_args()


def make_model(root: Path, options: argparse.Namespace) -> Path:
    """A model folder with random weights: the time is that of a trained one."""
    torch.manual_seed(0)
    folder, tower = root / "model", root / "tower"
    tower.mkdir()
    processor = {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (tower / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWER}))
    (tower / "preprocessor_config.json").write_text(json.dumps(processor))
    network = GridVit(read_spec(tower, "clip", -1, None, "square"))
    weights = {name: torch.randn(t.shape) * 0.05 for name, t in network.state_dict().items()}
    save_file(weights, tower / "model.safetensors")
    shutil.copytree(tower, folder / "vision")
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=8 * options.width // 3,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64, max_position_embeddings=2048, initializer_range=0.08,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    projector = build_projector("mlp2x_gelu", TOWER["hidden_size"], options.width)
    save_file(projector.state_dict(), folder / "projector.safetensors")
    found = describe_tower(str(folder / "vision"), "clip", -1, None, "square")
    vision = VisionSettings("clip", -1, None, "square", found.num_tokens, found.hidden_size, found.digest)
    ModelSettings(vision, ConversationSettings("v1", None), "mlp2x_gelu").write(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" ".join(WORDS), "USER: ASSISTANT: A chat between"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_questions(root: Path, options: argparse.Namespace) -> list[Asked]:
    """Questions of 4 to 40 words, several about each picture, one in eight without any."""
    generator = np.random.default_rng(0)
    for number in range(options.pictures):
        pixels = generator.integers(0, 256, (240, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg", quality=90)
    questions = []
    for number in range(options.questions):
        text = " ".join(generator.choice(WORDS, generator.integers(4, 41))) + "?"
        shown = number % 8 != 7
        name = str(root / f"{number % options.pictures}.jpg")
        pictures = (Picture(name, name),) if shown else ()
        item = Item(str(number), str(number), (ask(text, len(pictures)),), pictures)
        questions.append(asked("benchmark", item, Sampled(options.max_new_tokens), {}))
    return questions


def one_at_a_time(folder: Path, questions: list[Asked]) -> tuple[dict[str, str], float]:
    """Answers and seconds of the plain loop: picture, features, `generate`, one question after the other."""
    torch.set_num_threads(os.cpu_count() or 1)
    assistant = load_assistant(folder)

    def answer(one: Asked) -> str:
        images = [decode_image(Path(str(picture.uri)).read_bytes()) for picture in one.item.pictures]
        features = assistant.encode_images(images)
        return assistant.answer_batch([one.item.messages], [features], one.sampled.max_new_tokens)[0]

    answer(questions[0])  # warm
    start = time.perf_counter()
    answers = {one.key: answer(one) for one in questions}
    return answers, time.perf_counter() - start


def evaluation(
    folder: Path, questions: list[Asked], root: Path, options: argparse.Namespace
) -> tuple[dict[str, str], float]:
    """Answers and seconds of the evaluation, its start and its writing included."""
    ray.init(address="local", include_dashboard=False, object_store_memory=1 << 28, logging_level="ERROR")
    out = Storage(str(root / "out"))
    replicas = Replicas(
        options.replicas, options.cpus_per_replica, batch_size=options.batch_size, precision="float32"
    )
    start = time.perf_counter()
    answer_all(str(folder), questions, out, replicas)
    seconds = time.perf_counter() - start
    answers = {key: found.text for key, found in AnswerStore(out).load(questions).items()}
    ray.shutdown()
    return answers, seconds


def _report(
    options: argparse.Namespace, questions: list[Asked], alone: float, together: float, differ: int
) -> dict[str, Any]:
    return {
        "questions": len(questions),
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "cores": os.cpu_count(),
        "commit": code_version()["commit"],
        "loop_answers_per_second": round(len(questions) / alone, 2),
        "evaluation_answers_per_second": round(len(questions) / together, 2),
        "ratio": round(alone / together, 2),
        "answers_that_differ": differ,
        "peak_mib_of_loop": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
