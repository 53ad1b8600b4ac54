"""Small data of every task, in the official forms, with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHOICES = ["red", "green", "blue"]


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_scienceqa(folder: Path, count: int = 6) -> Path:
    problems = {
        str(n): {
            "question": f"Which colour is number {n}?", "choices": CHOICES, "answer": n % 3,
            "hint": "Look closely." if n % 2 else "", "image": "image.png" if n % 3 == 0 else None,
            "subject": "natural science", "grade": f"grade{n + 2}",
        }
        for n in range(count)
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    for n in range(0, count, 3):
        picture(folder / "images" / "test" / str(n) / "image.png", n)
    return folder


def make_pope(folder: Path, count: int = 8) -> Path:
    for n in range(4):
        picture(folder / "val2014" / f"{n}.jpg", n)
    for category in ("random", "popular"):
        rows = [
            {"question_id": n + 1, "image": f"{n % 4}.jpg", 
             "text": f"Is there a cup {'or so ' * (n % 5)}{n}?",
             "label": ("yes", "no")[n % 2]}
            for n in range(count)
        ]  # fmt: skip
        lines(folder / f"coco_pope_{category}.json", rows)
    return folder


def make_vqa(folder: Path) -> Path:
    for n in range(3):
        picture(folder / f"{n}.png", n)
    rows = [
        {"id": f"v{n}", "image": f"{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": CHOICES[n]},
            {"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(n)},
        ]}
        for n in range(3)
    ]  # fmt: skip
    rows.append({"id": "bad", "conversations": []})
    return lines(folder / "vqa.jsonl", rows)


def make_llava_bench(folder: Path, count: int = 6) -> Path:
    kinds = ("conv", "detail", "complex")
    for n in range(count):
        picture(folder / "images" / f"{n}.jpg", n)
    lines(
        folder / "questions.jsonl",
        [{"question_id": n, "image": f"{n}.jpg", "text": f"What is in picture {n}?", "category": kinds[n % 3]}
         for n in range(count)],
    )  # fmt: skip
    lines(
        folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}."} for n in range(count)]
    )
    lines(
        folder / "context.jsonl",
        [{"id": n, "image": f"{n}.jpg", "caption": f"A cup numbered {n}."} for n in range(count)],
    )
    return folder
