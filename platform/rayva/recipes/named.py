"""The named recipes. Each is another one with a few fields changed (sections of arXiv 2304.08485)."""

from __future__ import annotations

from typing import Any

from rayva.recipes.load import from_dict, merge, to_dict
from rayva.recipes.schema import (
    Conversation,
    Data,
    Evaluation,
    Features,
    Language,
    ProjectorConfig,
    Recipe,
    Scaling,
    Stage,
    Vision,
    Weights,
)


def derive(base: Recipe, name: str, **changes: dict[str, Any]) -> Recipe:
    """`base` under another name, with `changes` by section."""
    return from_dict(merge(to_dict(base), {"name": name, **changes}))


LLAVA_13B = Recipe(
    name="llava-13b",
    vision=Vision(path="openai/clip-vit-large-patch14", image_size=224, aspect="square"),
    language=Language(path="lmsys/vicuna-13b-v1.3", hidden_size=5120, layers=40, heads=40),
    projector=ProjectorConfig(kind="linear"),
    # The paper keeps the question in stage 1 and puts the image before or after it at random (equation 2).
    conversation=Conversation(template="v0", pretrain_template="v0", image_position="random"),
    data=Data(source="llava"),
    features=Features(encoders=8, encoder_gpus=1.0),
    pretrain=Stage(
        train="projector",
        lr=2e-3,
        batch_size=128,
        epochs=1.0,
        micro_batch_size=16,
        gradient_checkpointing=True,
    ),
    finetune=Stage(
        train="all",
        lr=2e-5,
        batch_size=32,
        epochs=3.0,
        micro_batch_size=4,
        gradient_checkpointing=True,
        zero=3,
    ),
    evaluation=Evaluation(max_new_tokens=64, gpus=1.0),
    scaling=Scaling(workers=8, cpus_per_worker=8.0, gpus_per_worker=1.0),
)
"""The paper on 8 A100s (section 4.2): warm-up 3 %, cosine, AdamW without weight decay, bf16."""

LLAVA_7B = derive(
    LLAVA_13B,
    "llava-7b",
    language={"path": "lmsys/vicuna-7b-v1.3", "hidden_size": 4096, "layers": 32, "heads": 32},
)

LLAVA_1_5_13B = derive(
    LLAVA_13B,
    "llava-1.5-13b",
    vision={"path": "openai/clip-vit-large-patch14-336", "image_size": 336, "aspect": "pad"},
    language={"path": "lmsys/vicuna-13b-v1.5"},
    projector={"kind": "mlp2x_gelu"},
    conversation={"template": "v1", "pretrain_template": "plain", "image_position": "front"},
    pretrain={"lr": 1e-3, "batch_size": 256, "micro_batch_size": 32},
    finetune={"batch_size": 128, "micro_batch_size": 16, "epochs": 1.0},
)

LLAVA_1_5_7B = derive(
    LLAVA_1_5_13B,
    "llava-1.5-7b",
    language={"path": "lmsys/vicuna-7b-v1.5", "hidden_size": 4096, "layers": 32, "heads": 32},
)

TINY = Recipe(
    name="tiny",
    vision=Vision(path="builtin:tiny"),
    language=Language(path="builtin:tiny"),
    weights=Weights(clip_steps=500, clip_batch_size=64, clip_lr=5e-4, language_steps=60),
    projector=ProjectorConfig(kind="linear"),
    # No system message: its words would be most of a sequence and teach nothing.
    conversation=Conversation(
        template="v1", pretrain_template="v1", system="", image_position="front", max_tokens=256
    ),
    data=Data(
        source="scenes",
        train_scenes=8000,
        validation_scenes=200,
        test_scenes=500,
        samples_per_image=30,
        questions_per_sample=1,
    ),
    features=Features(batch_size=256, shard_rows=4096),
    pretrain=Stage(
        train="projector",
        lr=5e-3,
        batch_size=64,
        epochs=0.5,
        micro_batch_size=64,
        precision="float32",
        checkpoint_every=50,
    ),
    finetune=Stage(
        train="all",
        lr=1.2e-3,
        projector_lr=4.8e-3,
        batch_size=32,
        epochs=1.0,
        micro_batch_size=32,
        precision="float32",
        checkpoint_every=200,
    ),
    evaluation=Evaluation(batch_size=128, max_new_tokens=16, min_accuracy=0.8, min_margin=0.4),
    scaling=Scaling(workers=1, cpus_per_worker=2.0),
)
"""Drawn scenes and models made on the spot: minutes on two cores, no network and no files."""

SMOL_ASSETS = "runs/smol-assets"
"""Where `make smol` puts what it fetches, relative to the checkout."""

SMOL = derive(
    TINY,
    "smol",
    vision={
        "kind": "efficientnet_lite", "path": f"{SMOL_ASSETS}/vision", "image_size": 128, "layer": -1,
        "aspect": "pad",
    },
    language={"path": f"{SMOL_ASSETS}/language"},
    projector={"kind": "mlp2x_gelu"},
    # No system message: on a CPU every token counts.
    conversation={"template": "chatml", "pretrain_template": "plain", "system": "", "max_tokens": 512},
    data={
        "source": "emoji", "emoji_dir": f"{SMOL_ASSETS}/emoji", "train_scenes": 0, "validation_scenes": 0,
        "test_scenes": 0, "samples_per_image": 4, "test_fraction": 0.19,
    },
    features={"batch_size": 64, "shard_rows": 2048},
    # Most of the names is learned here, where the language model cannot forget anything over them.
    pretrain={
        "lr": 2e-3, "batch_size": 16, "epochs": 8.0, "micro_batch_size": 16, "precision": "auto",
    },
    finetune={
        "lr": 1.5e-4, "projector_lr": 6e-4, "batch_size": 16, "epochs": 1.0, "micro_batch_size": 16,
        "precision": "auto", "checkpoint_every": 50,
    },
    evaluation={"batch_size": 32, "max_new_tokens": 24, "min_accuracy": 0.5, "min_margin": 0.2},
)  # fmt: skip
"""Real weights and real images on a laptop: SmolLM2-135M-Instruct, EfficientNet-Lite0 and emoji."""

NAMED: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (TINY, SMOL, LLAVA_7B, LLAVA_13B, LLAVA_1_5_7B, LLAVA_1_5_13B)
}
