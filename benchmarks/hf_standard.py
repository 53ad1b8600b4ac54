"""The standard way to train LLaVA: Hugging Face's model, Trainer and image processor.

Rows are padded on the right to the longest of their micro-batch, images are encoded by the frozen
tower in every step, and logits of every position are computed, as `LlavaForConditionalGeneration` does.
Frozen parts are in bf16 where training is in bf16 (as the original code has them), trained ones in fp32
under autocast. Everything else is the Trainer's default.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import rayva_side
import synthetic
import torch
from lengths import StageName
from synthetic import Setting
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rayva.recipes.schema import Stage
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from rayva.vision.decode import decode_image


def build_model(setting: Setting, stage: Stage, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Hugging Face's LLaVA with the very weights that Rayva's side has."""
    language, vision = synthetic.language_model(setting), synthetic.vision_model(setting)
    projector = synthetic.projector_of(setting)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=language.config.vocab_size - 1,
        image_seq_length=setting.image_tokens,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    assert isinstance(projector, nn.Sequential)
    model.model.multi_modal_projector.linear_1.load_state_dict(projector[0].state_dict())
    model.model.multi_modal_projector.linear_2.load_state_dict(projector[2].state_dict())
    model.tie_weights()
    trained = model.model.multi_modal_projector if stage.train == "projector" else model
    model.requires_grad_(False)
    trained.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


class Conversations(Dataset[dict[str, Any]]):
    """Tokenises and prepares the picture of a sample when it is asked for, as LLaVA's own dataset does."""

    def __init__(self, setting: Setting, stage: StageName, name: str, image_token: int) -> None:
        absent = rayva_side.NoFeatures(setting.image_tokens)
        self._source = rayva_side.source_of(setting, stage, name, absent)
        images = synthetic.images_table(setting)
        self._contents = dict(zip(images["image_id"].to_pylist(), images["content"], strict=True))
        self._processor = CLIPImageProcessorPil.from_pretrained(setting.file("vision"))
        self._image_token = image_token

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source.example(index, 0, Counter())
        assert example is not None
        images = [decode_image(self._contents[image_id].as_py()) for image_id in example.image_ids]
        ids = [self._image_token if token == IMAGE_TOKEN_INDEX else token for token in example.input_ids]
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return {"input_ids": ids, "labels": example.labels, "pixel_values": pixels}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads on the right to the longest row: ids, labels, mask [B, T]; pixels [M, 3, H, W]."""
    length = max(len(row["input_ids"]) for row in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BT = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        ids_BT[i, :size] = torch.tensor(row["input_ids"])
        labels_BT[i, :size] = torch.tensor(row["labels"])
        mask_BT[i, :size] = 1
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT, "pixel_values": pixels}


class _Order(Sampler[int]):
    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def __iter__(self) -> Any:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class _OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """A Trainer that takes samples in a given order."""

    order: Sequence[int] = ()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _Order(self.order)


class Clock(TrainerCallback):  # type: ignore[misc]
    """The end of each step in real and in CPU seconds of this process, and its loss."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(
    setting: Setting,
    name: StageName,
    table: str,
    stage: Stage,
    order: Sequence[int],
    dtype: torch.dtype,
    workers: int,
) -> Clock:
    """Trains on the samples of `order`, a global batch after the other; tells when each step ended."""
    model = build_model(setting, stage, dtype)
    arguments = TrainingArguments(
        output_dir=str(setting.file("hf-output")),
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=stage.batch_size // stage.micro_batch_size,
        max_steps=len(order) // stage.batch_size,
        learning_rate=stage.lr,
        lr_scheduler_type=stage.schedule,
        warmup_steps=0,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=stage.seed,
    )
    clock = Clock()
    trainer = _OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=Conversations(setting, name, table, model.config.image_token_index),
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.order = order
    trainer.train()
    return clock
