"""Small base models trained on the spot: what the `tiny` recipe has in place of CLIP and Vicuna.

A byte-level BPE tokenizer, a `CLIPModel` trained contrastively on pairs of scenes and captions, and a
`LlamaForCausalLM` trained on text about scenes. All are saved in Hugging Face's format and loaded by
the code that loads `openai/clip-vit-large-patch14` and a Vicuna folder.

What a step trains on is a function of the step's number alone, and a checkpoint holds everything else,
so that training that was killed goes on and ends with the very same weights.
"""

from __future__ import annotations

import io
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rayva.data import scenes
from rayva.instruct import symbolic
from rayva.progress import Progress
from rayva.recipes.schema import Weights
from rayva.storage import Storage

PATCH = 32
"""Patches as large as the cells that scenes are drawn in: nine grid features a picture."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_PAD_ID, _EOS_ID, _BOS_ID = 0, 1, 2
"""A CLIP text encoder whose end token is 2 is taken for one of the first released ones: transformers
then reads the caption at its highest token id instead of at its end."""
_CROWDED_SHARE = 0.2
"""Of the scenes with several objects, how many the vision tower learns from."""
_POSITION_STD = 0.5
"""Far above CLIP's own: few steps have to carry where a patch is through to the last layers."""
_CORPUS_SCENES = 1500
_CHECKPOINT_STEPS = 50


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: the words of scenes are one token each, anything else is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def _corpus(seed: int) -> Iterator[str]:
    yield from ["USER: ASSISTANT:"] * 50
    for _, record in scenes.generate("train", _CORPUS_SCENES, seed):
        yield record.captions[0]
        for kind in ("conversation", "detail", "complex"):
            for turn in symbolic.respond(record, kind, seed):
                yield f" {turn.text.removeprefix('<image>')}"


@dataclass
class Trainee:
    """A model in training: `loss` maps a step's number to the loss of that step's batch."""

    what: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    lr: float


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    warmup = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(trainee: Trainee, storage: Storage, checkpoint: str) -> float:
    """Trains to the end, from `checkpoint` (a path under the storage root) where there is one.

    Returns the mean loss of the last 20 steps. The checkpoint is deleted by the caller, once what
    was trained is safely written.
    """
    parameters = list(trainee.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=trainee.lr, betas=(0.9, 0.98), weight_decay=0.01)
    done, losses = _restore(trainee.model, optimizer, storage, checkpoint)
    with Progress(trainee.what, trainee.steps, "steps", done=done) as progress:
        for step in range(done, trainee.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, trainee.steps, trainee.lr)
            loss = trainee.loss(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses = [*losses[-19:], loss.item()]
            progress.advance(loss=losses[-1])
            if (step + 1) % _CHECKPOINT_STEPS == 0:
                _save(trainee.model, optimizer, step + 1, losses, storage, checkpoint)
    return sum(losses) / len(losses)


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    losses: list[float],
    storage: Storage,
    checkpoint: str,
) -> None:
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "losses": losses}
    torch.save(state, buffer)
    storage.write_bytes(checkpoint, buffer.getvalue())


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, storage: Storage, checkpoint: str
) -> tuple[int, list[float]]:
    if not storage.exists(checkpoint):
        return 0, []
    state = torch.load(io.BytesIO(storage.read_bytes(checkpoint)), weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), list(state["losses"])


# --- the vision tower ---


def clip_model(vocab_size: int) -> CLIPModel:
    """A CLIP with nine patches of 32 x 32 pixels and a text encoder for captions of scenes."""
    text = {
        "vocab_size": vocab_size, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 80, "pad_token_id": _PAD_ID,
        "bos_token_id": _BOS_ID, "eos_token_id": _EOS_ID,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": scenes.SIDE, "patch_size": PATCH,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=_POSITION_STD)
    return model


def _clip_scenes(rng: random.Random) -> Iterator[scenes.Scene]:
    """A scene, and the same with other shapes in the place of one object.

    Side by side in one batch they make the model look at shapes, which colours, sizes and places would
    let it do without. Mostly it is a single object: then its caption has nothing to sort out.
    """
    while True:
        scene = scenes.draw_scene(rng, "train")
        if len(scene) == 1 or rng.random() < _CROWDED_SHARE:
            break
    i = rng.randrange(len(scene))
    for shape in scenes.SHAPES:
        changed = (*scene[:i], replace(scene[i], shape=shape), *scene[i + 1 :])
        if scenes.is_valid(changed, "train"):
            yield changed


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """CLIP's symmetric loss over the pairs of a batch; pixels [B, 3, H, W], ids and mask [B, T]."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))
    logits_BB = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image
    target_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def clip_trainee(tokenizer: PreTrainedTokenizerFast, weights: Weights, seed: int) -> Trainee:
    torch.manual_seed(seed)
    model = clip_model(len(tokenizer))
    mean, std = _clip_statistics()

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/clip/{step}")
        batch: list[scenes.Scene] = []
        while len(batch) < weights.clip_batch_size:
            batch += _clip_scenes(rng)
        batch = batch[: weights.clip_batch_size]
        pictures = np.stack([np.asarray(scenes.render(scene)) for scene in batch])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255)
        text = [[_BOS_ID, *tokenizer.encode(scenes.caption(s, rng))[:78], _EOS_ID] for s in batch]
        ids, mask = _pad(text, _EOS_ID)
        return contrastive_loss(model, (pixels - mean) / std, ids, mask)

    return Trainee("weights: vision tower", model, loss, weights.clip_steps, weights.clip_lr)


def _clip_statistics() -> tuple[Tensor, Tensor]:
    processor = CLIPImageProcessorPil()
    return torch.tensor(processor.image_mean).view(3, 1, 1), torch.tensor(processor.image_std).view(3, 1, 1)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, storage: Storage, rel: str) -> None:
    """Saves model, image processor and the tokenizer of its captions as the folder `rel`."""
    size = {"height": scenes.SIDE, "width": scenes.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": scenes.SIDE}, crop_size=size)
    _save_pretrained((model, processor, tokenizer), storage, rel)


def _save_pretrained(parts: tuple[Any, ...], storage: Storage, rel: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rayva-") as scratch:
        for part in parts:
            part.save_pretrained(scratch)
        storage.upload(Path(scratch), rel)


# --- the language model ---


def language_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of 0.6 M parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=_PAD_ID,
        bos_token_id=_BOS_ID,
        eos_token_id=_EOS_ID,
    )
    return LlamaForCausalLM(config)


def language_trainee(tokenizer: PreTrainedTokenizerFast, weights: Weights, seed: int) -> Trainee:
    """Learns the language of scenes from text alone: a caption, then questions that it answers."""
    torch.manual_seed(seed)
    model = language_model(len(tokenizer))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/text/{step}")
        ids, mask = _pad([_text_ids(tokenizer, rng) for _ in range(weights.language_batch_size)], _PAD_ID)
        hidden_BTD = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        keep = mask[:, 1:].bool()
        return F.cross_entropy(model.lm_head(hidden_BTD[:, :-1][keep]), ids[:, 1:][keep])

    steps, lr = weights.language_steps, weights.language_lr
    return Trainee("weights: language model", model, loss, steps, lr)


def _text_ids(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    scene = scenes.draw_scene(rng, "train")
    record = scenes.to_record(scene, str(rng.random()), rng, draw=False)
    ids = [_BOS_ID, *tokenizer.encode(f"USER: {record.captions[0]}\n")]
    turns = symbolic.respond(record, rng.choice(("conversation", "conversation", "detail", "complex")), 0)
    for turn in turns:
        text = turn.text.removeprefix("<image>\n")
        if turn.role == "human":
            ids += tokenizer.encode(f"{text} ASSISTANT:")
        else:
            ids += [*tokenizer.encode(f" {text}"), _EOS_ID, *tokenizer.encode("USER: ")]
    return ids


def save_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, storage: Storage, rel: str
) -> None:
    """Saves model and tokenizer as the folder `rel`."""
    _save_pretrained((model, tokenizer), storage, rel)


def _pad(rows: list[list[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows as ids [B, T] and mask [B, T], filled on the right."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
