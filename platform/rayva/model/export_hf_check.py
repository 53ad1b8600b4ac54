"""Proves an exported checkpoint: its logits on a fixed batch against the source's, in fp32.

Shapes: T positions, V vocabulary of the source, N tokens and D hidden size of one picture's features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel

from rayva.errors import WeightsError
from rayva.model.batch import Row, collate, expand_images
from rayva.model.folder import Assistant, load_assistant
from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IMAGE_TOKEN_INDEX, encode_prompt

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest accepted difference of a logit, both sides computed in fp32."""

_QUESTIONS = ("What is in the picture?", "Where is it?")
_SIZES = ((96, 64), (60, 80))
"""Width and height of the fixed pictures: one wide, one tall."""


def check_export(source: Path, exported: Path) -> float:
    """Largest difference between the logits of a Rayva folder and those of its export.

    The source encodes, projects and splices with this project's own code; the export runs through
    `AutoProcessor` and `LlavaForConditionalGeneration`. The two are in memory one after the other.

    Raises:
        WeightsError: a logit differs by more than 1e-3, or is not finite.
    """
    references, rows = _source_logits(source)
    found = _exported_logits(exported, rows)
    worst = 0.0
    for reference_TV, found_TV in zip(references, found, strict=True):
        difference = (reference_TV - found_TV[:, : reference_TV.shape[1]]).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("nan")
    if not worst <= TOLERANCE:
        raise WeightsError(
            f"the exported model's logits differ from the source's by {worst:.2e} (allowed: {TOLERANCE:.0e})",
            "the export was not kept; check that the model folder is complete and unchanged",
        )
    return worst


def _conversations() -> list[tuple[list[Message], list[Image.Image]]]:
    """The fixed batch: a question about each picture."""
    draw = np.random.default_rng(0)
    cases = []
    for question, (width, height) in zip(_QUESTIONS, _SIZES, strict=True):
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cases.append(([Message("user", (IMAGE, f"\n{question}"))], [picture]))
    return cases


def _source_logits(source: Path) -> tuple[list[Tensor], list[list[int]]]:
    """Logits [T, V] of each conversation, and its token ids with -200 at each image position."""
    assistant = load_assistant(source, "cpu", torch.float32)
    logits, rows = [], []
    for messages, pictures in _conversations():
        ids = encode_prompt(messages, assistant.template, assistant.tokenizer)
        ids, labels = expand_images(ids, None, assistant.settings.vision.tokens)
        logits.append(_row_logits(assistant, Row(ids, labels, torch.cat(assistant.encode_images(pictures)))))
        rows.append(ids)
    return logits, rows


@torch.inference_mode()
def _row_logits(assistant: Assistant, row: Row) -> Tensor:
    hidden_1TH = assistant.model.forward_hidden(collate([row], assistant.model.vision_hidden))
    logits_TV: Tensor = assistant.model.language.get_output_embeddings()(hidden_1TH[0])
    return logits_TV.float()


@torch.inference_mode()
def _exported_logits(exported: Path, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    _refuse_gaps(info)
    processor = AutoProcessor.from_pretrained(exported)
    logits = []
    for (messages, pictures), row in zip(_conversations(), rows, strict=True):
        ids_T = torch.tensor(row).masked_fill(
            torch.tensor(row) == IMAGE_TOKEN_INDEX, model.config.image_token_index
        )
        _compare_prompt(processor, messages, pictures, ids_T)
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        logits.append(_hf_logits(model, ids_T, pixels))
    return logits


def _hf_logits(model: PreTrainedModel, ids_T: Tensor, pixels_13HW: Tensor) -> Tensor:
    return cast(Tensor, model(input_ids=ids_T[None], pixel_values=pixels_13HW).logits[0].float())


def _refuse_gaps(info: dict[str, Any]) -> None:
    """A checkpoint that loads with a warning about its names is not an export."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[what])
        if names:
            raise WeightsError(f"the exported model has {what.replace('_', ' ')}: {', '.join(names[:4])}")


def _compare_prompt(
    processor: Any, messages: list[Message], pictures: list[Image.Image], ids_T: Tensor
) -> None:
    """The exported chat template must lead to the very tokens that the model was trained on."""
    content = [{"type": "image"}, {"type": "text", "text": messages[0].text.strip()}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = processor(text=text, images=pictures, add_special_tokens=False).input_ids[0]
    if list(found) != ids_T.tolist():
        logger.warning("the exported chat template is tokenised differently from training: %s", text)
