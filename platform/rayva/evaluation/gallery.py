"""A gallery of test images: what was asked about them, and what the model said."""

from __future__ import annotations

import base64
import hashlib
import io
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from rayva.data.schema import Question
from rayva.evaluation.grounding import GATE_TASK, Condition
from rayva.evaluation.metrics import Answer

_SIDE = 224
_TEXT_WIDTH = 46
_LINE = 22
CONDITION_NAMES: dict[Condition, str] = {
    "right_image": "right image",
    "shuffled_images": "another image",
    "no_image": "no image",
}


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One question and its answers under each condition."""

    question: Question
    answers: Mapping[Condition, Answer]

    @property
    def image_ids(self) -> list[str]:
        """Images that it needs: the right one first."""
        shown = (answer.ask.image_id for answer in self.answers.values())
        return [image_id for image_id in shown if image_id is not None]


def choose(answers: Sequence[Answer], count: int) -> list[Exhibit]:
    """`count` questions with images, drawn evenly over the kinds and never by the answer.

    The gate's task comes first; an image is shown once as long as there are others.
    """
    by_question: dict[str, dict[Condition, Answer]] = defaultdict(dict)
    for answer in answers:
        by_question[answer.ask.question.question_id][answer.ask.condition] = answer
    groups: dict[tuple[bool, str, str], list[Exhibit]] = defaultdict(list)
    for given in by_question.values():
        if "right_image" in given:
            question = given["right_image"].ask.question
            ordered = {condition: given[condition] for condition in CONDITION_NAMES if condition in given}
            key = (question.task != GATE_TASK, question.task, question.kind)
            groups[key].append(Exhibit(question, ordered))
    for members in groups.values():
        members.sort(key=lambda exhibit: hashlib.sha256(exhibit.question.question_id.encode()).digest())
    queues = [groups[key] for key in sorted(groups)]
    chosen: list[Exhibit] = []
    shown: set[str] = set()
    while len(chosen) < count and any(queues):
        for queue in filter(None, queues):
            fresh = (n for n, exhibit in enumerate(queue) if exhibit.question.image_id not in shown)
            exhibit = queue.pop(next(fresh, 0))
            chosen.append(exhibit)
            shown.add(exhibit.question.image_id)
    return chosen[:count]


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy whose longer side is at most 224 pixels; small pictures are enlarged without blur."""
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)


def data_uri(image: Image.Image) -> str:
    """A small picture as a data URI (WebP)."""
    sink = io.BytesIO()
    image.save(sink, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()


def card(exhibit: Exhibit, picture: Image.Image) -> bytes:
    """Picture, question, reference and answers as one PNG, for trackers that show pictures."""
    lines = _card_lines(exhibit)
    height = max(_SIDE + 32, _LINE * len(lines) + 32)
    canvas = Image.new("RGB", (_SIDE + 32 + 460, height), "white")
    canvas.paste(picture, (16, 16))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    for row, (text, colour) in enumerate(lines):
        draw.text((_SIDE + 32, 16 + _LINE * row), text, fill=colour, font=font)
    sink = io.BytesIO()
    canvas.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _card_lines(exhibit: Exhibit) -> list[tuple[str, str]]:
    """Text and colour of each line."""
    question = exhibit.question
    blocks = [(question.question, "#111"), (f"Reference: {' / '.join(question.accepted[:3])}", "#555")]
    for condition, answer in exhibit.answers.items():
        colour = "#14803c" if answer.correct else "#b42318"
        blocks.append((f"{CONDITION_NAMES[condition]}: {answer.text}", colour))
    return [
        (line, colour)
        for text, colour in blocks
        for line in textwrap.wrap(text, _TEXT_WIDTH, max_lines=4) or [""]
    ]
