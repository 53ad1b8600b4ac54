"""Gathers what the evaluation report shows from the step folders, and writes it with its pictures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from rayva.evaluation.curves import curve, png
from rayva.evaluation.gallery import Exhibit, card, choose, data_uri, thumbnail
from rayva.evaluation.gate import Decision
from rayva.evaluation.metrics import Answer
from rayva.evaluation.report import Page, render
from rayva.orchestration.pipeline import StepContext
from rayva.provenance import code_version
from rayva.recipes.schema import STAGES
from rayva.steps import StepFolder, command_to_go_on
from rayva.tracking.history import HISTORY, read_history
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes

_CURVES = ("loss", "lr", "grad_norm")
_COUNTED = {"images": "images", "pretrain": "stage 1 samples", "finetune": "stage 2 samples",
            "questions": "held-out questions"}  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """What the evaluation found."""

    answers: Sequence[Answer]
    decision: Decision
    outputs: dict[str, Any]


def write_report(ctx: StepContext, evaluated: Evaluated) -> list[str]:
    """Writes report.html, gallery/*.png and curves/*.png; returns their paths under the storage root."""
    steps = _ancestors(ctx)
    stages: dict[str, list[dict[str, float]]] = {
        name: read_history(ctx.storage, steps[name].join(HISTORY)) for name in STAGES if name in steps
    }
    exhibits = choose(evaluated.answers, ctx.recipe.evaluation.gallery)
    pictures = _thumbnails(ctx, {image_id for exhibit in exhibits for image_id in exhibit.image_ids})
    page = Page(
        recipe=ctx.recipe.name,
        commit=str(code_version()["commit"]),
        decision=evaluated.decision,
        answers=evaluated.answers,
        stages=stages,
        exhibits=exhibits,
        pictures={image_id: data_uri(picture) for image_id, picture in pictures.items()},
        steps=_times(ctx, steps),
        counts=_counts(steps),
        reasons=_reasons(steps, evaluated),
        commands=_commands(ctx),
    )
    report = ctx.folder.join("report.html")
    ctx.storage.write_bytes(report, render(page).encode())
    written = [report, ctx.folder.join("metrics.json")]
    return written + _write_curves(ctx, stages) + _write_gallery(ctx, exhibits, pictures)


def _ancestors(ctx: StepContext) -> dict[str, StepFolder]:
    """The folders of all finished steps that this one rests on, by name, first to last."""
    found: dict[str, StepFolder] = {}
    queue = list(ctx.inputs.values())
    while queue:
        folder = queue.pop()
        if folder.name not in found:
            found[folder.name] = folder
            manifest = folder.manifest() or {}
            needed: dict[str, str] = manifest.get("inputs", {})
            queue += [StepFolder(ctx.storage, name, digest) for name, digest in needed.items()]
    return dict(sorted(found.items(), key=lambda item: _finished(item[1])))


def _finished(folder: StepFolder) -> float:
    return float((folder.manifest() or {}).get("finished", 0.0))


def _times(ctx: StepContext, steps: dict[str, StepFolder]) -> list[tuple[str, float, str]]:
    times = [
        (name, float((folder.manifest() or {}).get("seconds", 0.0)), ctx.storage.uri(folder.rel))
        for name, folder in steps.items()
    ]
    return [*times, (ctx.folder.name, sum(ctx.folder.attempts()), ctx.storage.uri(ctx.folder.rel))]


def _counts(steps: dict[str, StepFolder]) -> dict[str, int]:
    data = steps["data"].outputs
    counts = {words: int(data[name]) for name, words in _COUNTED.items() if name in data}
    return counts | {"images with features": int(steps["features"].outputs["images"])}


def _reasons(steps: dict[str, StepFolder], evaluated: Evaluated) -> list[tuple[str, str, int]]:
    rows: list[tuple[str, str, int]] = []
    for name, folder in steps.items():
        outputs = folder.outputs
        for key in ("quarantined", "left_out"):
            rows += [(name, reason, int(count)) for reason, count in outputs.get(key, {}).items() if count]
    return rows + [("evaluate", reason, count) for reason, count in evaluated.outputs["left_out"].items()]


def _thumbnails(ctx: StepContext, image_ids: Iterable[str]) -> dict[str, Image.Image]:
    wanted = set(image_ids)
    if not wanted:
        return {}
    data = ctx.recipe.data
    columns = ["image_id", "uri", "content"]
    with ctx.storage.open(ctx.inputs["data"].join("images.parquet")) as file:
        rows = pq.read_table(file, columns=columns, filters=[("image_id", "in", wanted)]).to_pylist()
    found = {}
    for row in rows:
        try:
            content = row["content"]
            content = read_image_bytes(row["uri"], data.max_bytes) if content is None else content
            image = decode_image(content, data.max_pixels, data.max_bytes)
        except BadImage:
            continue  # it was there when its features were made; the report says that it is gone
        found[row["image_id"]] = thumbnail(image)
    return found


def _write_curves(ctx: StepContext, stages: dict[str, list[dict[str, float]]]) -> list[str]:
    if ctx.storage.is_local:
        # Matplotlib keeps a list of fonts, which belongs under the storage root like all the rest.
        os.environ.setdefault("MPLCONFIGDIR", ctx.storage.path(".cache/matplotlib"))
    written = []
    for stage, rows in stages.items():
        for figure in _CURVES:
            line = curve(rows, figure)
            if line.steps:
                written.append(ctx.folder.join("curves", f"{stage}_{figure}.png"))
                ctx.storage.write_bytes(written[-1], png(line, f"{ctx.recipe.name}: {stage}", figure))
    return written


def _write_gallery(
    ctx: StepContext, exhibits: Sequence[Exhibit], pictures: dict[str, Image.Image]
) -> list[str]:
    written = []
    for number, exhibit in enumerate(exhibits):
        picture = pictures.get(exhibit.question.image_id)
        if picture is not None:
            written.append(ctx.folder.join("gallery", f"{number:03d}.png"))
            ctx.storage.write_bytes(written[-1], card(exhibit, picture))
    return written


def _commands(ctx: StepContext) -> list[tuple[str, str]]:
    model = shlex.quote(ctx.storage.uri(ctx.inputs["finetune"].join("model")))
    tracking = ctx.tracker.info()["tracking_uri"]
    server = str(tracking).startswith(("http://", "https://"))
    return [
        ("Chat with the model about a picture of yours:", f"rayva chat {model} --image PICTURE"),
        (
            "See curves, gallery and lineage in MLflow:",
            str(tracking) if server else f"mlflow ui --backend-store-uri {shlex.quote(str(tracking))}",
        ),
        (
            "Train longer; only what depends on the change runs again:",
            command_to_go_on(ctx.storage, "finetune.epochs=2"),
        ),
        (
            "Every answer as a table:",
            f"python -c \"import pandas; print(pandas.read_parquet('{ctx.storage.uri(ctx.folder.rel)}"
            "/answers.parquet'))\"",
        ),
    ]
