"""The step `register`: the model goes into the registry with its lineage, and is promoted if it passed."""

from __future__ import annotations

import hashlib
from typing import Any

from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.progress import Progress, say
from rayva.provenance import code_version
from rayva.storage import Storage
from rayva.tracking.registry import CHAMPION, DIGEST_TAG

_CHUNK = 1 << 22


def run(ctx: StepContext) -> StepResult:
    """Makes a version with the alias `candidate`, and `champion` too if the gate passed.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    name = ctx.recipe.tracking.model_name or f"rayva-{ctx.recipe.name}"
    evaluated, finetune, export = (ctx.inputs[step] for step in ("evaluate", "finetune", "export"))
    model = finetune.join("model")
    files = file_digests(ctx.storage, model)
    passed = bool(evaluated.outputs["passed"])
    tags = {
        DIGEST_TAG: folder_digest(files),
        "rayva.recipe": ctx.recipe.name,
        "rayva.commit": str(code_version()["commit"]),
        "rayva.finetune": finetune.digest,
        "rayva.evaluate": evaluated.digest,
        "rayva.export": ctx.storage.uri(export.join(export.outputs["path"])),
        "rayva.gate": "passed" if passed else "not passed",
        "rayva.accuracy": f"{evaluated.outputs['grounding']['accuracy']:.4f}",
    }
    about: dict[str, Any] = {
        "files": files,
        "lineage": {step: dict((folder.manifest() or {}).get("inputs", {}), digest=folder.digest)
                    for step, folder in ctx.inputs.items()},
        "grounding": evaluated.outputs["grounding"],
        "gate": evaluated.outputs["why"],
    }  # fmt: skip
    registered = ctx.tracker.register_model(name, ctx.storage.uri(model), tags, about, champion=passed)
    aliases = ", ".join(registered.aliases)
    say(f"  register: {name} version {registered.version} ({aliases})")
    if not passed:
        say(f"  register: not promoted to {CHAMPION}. {evaluated.outputs['why']}")
    outputs = {
        "model_name": registered.name,
        "version": registered.version,
        "aliases": list(registered.aliases),
        "digest": tags[DIGEST_TAG],
    }
    return StepResult(outputs, {"version": float(registered.version)})


def file_digests(storage: Storage, rel: str) -> dict[str, str]:
    """sha256 (hex) of each file under the folder `rel`, by its path in it."""
    sizes = storage.files(rel)
    digests = {}
    with Progress("register: digests", sum(sizes.values()) >> 20, "MB") as progress:
        read = 0
        for name, size in sizes.items():
            digest = hashlib.sha256()
            with storage.open(f"{rel}/{name}") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            digests[name] = digest.hexdigest()
            read += size
            progress.advance((read >> 20) - progress.done)
    return digests


def folder_digest(files: dict[str, str]) -> str:
    """sha256 (hex) of a folder: of its files' paths and digests, as `sha256sum` prints them."""
    text = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()
