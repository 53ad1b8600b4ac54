"""The step `export`: the finished model as a folder that other programs load."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rayva.model.export_hf import export_hf, export_rayva, has_hf_class
from rayva.model.folder import ModelSettings
from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.progress import say
from rayva.storage import storage_errors


def run(ctx: StepContext) -> StepResult:
    """Writes `hf/` (or `rayva/` for a tower that Hugging Face's LLaVA cannot hold) in the step's folder.

    The step's outputs tell the format, the folder's name and, for `hf`, the largest difference of a
    logit from the model's own (fp32).
    """
    source = ctx.storage.localize(ctx.inputs["finetune"].join("model"))
    settings = ModelSettings.read(source)
    form = "hf" if has_hf_class(settings) else "rayva"
    place = ctx.folder.join(form)
    ctx.storage.delete(place)  # left by an attempt that ended before its manifest
    ctx.storage.makedirs(ctx.folder.rel)
    with storage_errors(ctx.storage.uri(place)):
        if ctx.storage.is_local:
            difference = _write(source, Path(ctx.storage.path(place)), form)
        else:
            with tempfile.TemporaryDirectory(prefix="rayva-export-") as scratch:
                local = Path(scratch) / form
                difference = _write(source, local, form)
                ctx.storage.upload(local, place)
    if difference is None:
        why = f"Hugging Face's LLaVA has no {settings.vision.kind} vision tower"
        say(f"Exported as a Rayva folder: {why}.")
        return StepResult({"format": form, "path": form, "max_logit_difference": None, "why": why})
    say(f"Exported; the largest difference of a logit is {difference:.1e} (allowed: 1e-03).")
    outputs = {"format": form, "path": form, "max_logit_difference": difference, "why": ""}
    return StepResult(outputs, {"max_logit_difference": difference})


def _write(source: Path, target: Path, form: str) -> float | None:
    if form == "hf":
        return export_hf(source, target)
    export_rayva(source, target)
    return None
