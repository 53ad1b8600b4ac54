"""What full.py needs beside the samples: captions for stage 1, questions for the gate, and settings.

The captions are the contexts' own; nothing of this asks a teacher.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Question
from rayva.instruct.contexts import Context
from rayva.steps import StepFolder
from rayva.text.instructions import BRIEF, choose_instruction

CAPTIONS, HELD_OUT, SETTINGS = "captions.json", "held_out.json", "train.yaml"
IMAGES, HELD_OUT_IMAGES = "images", "held_out_images"


def caption_rows(contexts: Iterable[tuple[Context, str]], seed: int) -> list[dict[str, Any]]:
    """LLaVA JSON of stage 1 (section 4.2): a request for a brief description, answered by a caption.

    Args:
        contexts: with the image's name in the file.
    """
    rows = []
    for context, image in contexts:
        caption = random.Random(f"{seed}/caption/{context.id}").choice(context.captions)
        question = f"{IMAGE_PLACEHOLDER}\n{choose_instruction(BRIEF, seed, context.id)}"
        rows.append(_row(f"{context.id}-caption", image, question, caption))
    return rows


def held_out_rows(questions: Iterable[Question], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """LLaVA JSON of a built-in dataset's own questions about its test images.

    Args:
        names: of the image files, by image id.
    """
    return [
        {
            **_row(
                asked.question_id, names[asked.image_id], f"{IMAGE_PLACEHOLDER}\n{asked.question}",
                asked.accepted[0],
            ),
            "match": asked.match,
            "kind": asked.kind,
        }
        for asked in questions
    ]  # fmt: skip


def _row(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def write_rows(folder: StepFolder, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes LLaVA JSON into `folder`."""
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    folder.storage.write_bytes(folder.join(name), (text + "\n").encode())


def write_images(folder: StepFolder, name: str, files: Mapping[str, ImageRecord]) -> None:
    """Writes the pictures (by file name) into the folder `name` of `folder`; those that are there stay."""
    for file, record in files.items():
        rel = folder.join(name, file)
        if record.content is not None and not folder.storage.exists(rel):
            folder.storage.write_bytes(rel, record.content)


def write_settings(folder: StepFolder, own_images: bool, held_out: bool) -> str:
    """Writes the settings with which full.py trains on the files in `folder`; returns their URI.

    Args:
        own_images: whether the pictures are in `folder`; else the user names where they are.
        held_out: whether questions of the dataset are; else some of the images are held out.
    """

    def uri(name: str) -> str:
        return folder.storage.uri(folder.join(name))

    data = {"source": "llava", "pretrain_json": uri(CAPTIONS), "finetune_json": uri("samples.json")}
    if own_images:
        data |= {"pretrain_images": uri(IMAGES), "finetune_images": uri(IMAGES)}
    if held_out:
        data |= {"held_out_json": uri(HELD_OUT), "held_out_images": uri(HELD_OUT_IMAGES)}
    text = yaml.safe_dump({"data": data}, sort_keys=False, allow_unicode=True, width=1000)
    folder.storage.write_bytes(folder.join(SETTINGS), text.encode())
    return uri(SETTINGS)
