"""What a job has made: `summary.json` for programs, and the same in words for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rayva.errors import StorageError
from rayva.orchestration.console import program
from rayva.progress import duration
from rayva.recipes import Recipe
from rayva.recipes.schema import STAGES
from rayva.steps import SUMMARY, StepFolder, read_summary
from rayva.storage import Storage
from rayva.tracking.address import tracking_uri
from rayva.tracking.mlflow_tracker import with_run_id

_GROUNDING = ("accuracy", "accuracy_shuffled_images", "accuracy_no_image", "questions")


_COUNTED = {
    "data": ("quarantined", "noted"),
    "features": ("quarantined",),
    "pretrain": ("samples", "distinct_samples", "left_out", "changed"),
    "finetune": ("samples", "distinct_samples", "left_out", "changed"),
    "evaluate": ("left_out",),
}
"""Outputs by step that count rows, samples and questions."""


def build_summary(
    recipe: Recipe,
    storage: Storage,
    steps: Mapping[str, tuple[StepFolder, dict[str, Any] | None]],
    executed: set[str],
) -> dict[str, Any]:
    """The summary of what is finished for this recipe; null where a step has not run yet.

    Args:
        steps: folder and manifest (None: unfinished) of each step, in order.
        executed: steps that ran in this start of the job; the others are marked as skipped.

    `datasets` has a mix's counts: samples by stage and dataset under `data`, and `samples` and `visited`
    by dataset under each stage. `samples` tells of rows that were not used, or not as they are: under `data`
    and `features` what is quarantined, under `data` also what is used but `noted` as odd, under each stage
    what is left out before it starts and what is changed on the way (truncated, dropped), all by reason; a
    sample that is changed in each epoch counts each time.
    Under `evaluate` it is the held-out questions that were not asked.
    """
    done = {name: (folder, manifest) for name, (folder, manifest) in steps.items() if manifest}
    outputs = {name: manifest["outputs"] for name, (_, manifest) in done.items() if manifest}
    manifests = sorted((m for _, m in done.values() if m), key=lambda m: float(m["finished"]))
    tracked = [manifest["mlflow"] for manifest in manifests if manifest["mlflow"]]
    evaluation, registered = outputs.get("evaluate"), outputs.get("register")
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "commit": manifests[-1]["code"]["commit"] if manifests else None,
        "stages": {
            name: {
                "seconds": manifest["seconds"],
                "digest": manifest["digest"],
                "folder": storage.uri(folder.rel),
                "skipped": name not in executed,
            }
            for name, (folder, manifest) in done.items()
            if manifest
        },
        "datasets": {
            name: outputs[name]["datasets"]
            for name in ("data", "pretrain", "finetune")
            if "datasets" in outputs.get(name, {})
        },
        "samples": {
            name: {key: outputs[name][key] for key in keys if key in outputs[name]}
            for name, keys in _COUNTED.items()
            if name in outputs
        },
        "grounding": {key: evaluation["grounding"].get(key) for key in _GROUNDING} if evaluation else None,
        "gate": {"passed": evaluation["passed"], "why": evaluation["why"]} if evaluation else None,
        "mlflow": _where_now(tracked[-1], recipe, storage) if tracked else None,
        "model": (
            {
                "name": registered["model_name"],
                "version": registered["version"],
                "aliases": registered["aliases"],
            }
            if registered
            else None
        ),
        "export": storage.uri(done["export"][0].join("hf")) if "export" in done else None,
        "assistant": storage.uri(done["finetune"][0].join("model")) if "finetune" in done else None,
        "served": _kept_answers(storage, done["export"][0].digest if "export" in done else None),
    }
    return summary


def _where_now(info: dict[str, Any], recipe: Recipe, storage: Storage) -> dict[str, Any]:
    """Where the job is in MLflow. A run's own SQLite store moves with the run."""
    tracked = with_run_id(info, storage)
    kept = str(tracked["tracking_uri"])
    own = storage.is_local and recipe.tracking.uri is None and kept.endswith("/mlflow.db")
    if own and kept.startswith("sqlite:"):
        return {**tracked, "tracking_uri": tracking_uri(None, storage)}
    return tracked


def _kept_answers(storage: Storage, export_digest: str | None) -> dict[str, Any] | None:
    """Answers that the endpoint gave stand as long as the exported model is the same."""
    if export_digest is None or not storage.exists(SUMMARY):
        return None
    try:
        before = read_summary(storage)
    except StorageError:
        return None  # whatever it is: the job writes its own now
    same = before["stages"].get("export", {}).get("digest") == export_digest
    return before.get("served") if same else None


def write_summary(storage: Storage, summary: Mapping[str, Any]) -> None:
    storage.write_json(SUMMARY, summary)


def record_served(storage: Storage, picture: str, answers: list[dict[str, str]]) -> None:
    """Adds to the summary what the endpoint answered about `picture`."""
    summary = read_summary(storage)
    summary["served"] = {"picture": picture, "answers": answers}
    write_summary(storage, summary)


def summary_text(summary: Mapping[str, Any], storage: Storage) -> str:
    """The summary for people: where things are, what the figures mean, what to do next."""
    total = sum(stage["seconds"] for stage in summary["stages"].values())
    lines = ["", f"Recipe {summary['recipe']}, code {_short(summary['commit'])}, {duration(total)} in all:"]
    for name, stage in summary["stages"].items():
        lines.append(f"  {name:<10} {duration(stage['seconds']):>12}  {stage['folder']}")
    lines += _mix(summary)
    lines += _not_as_they_are(summary)
    lines += _figures(summary)
    lines += _next(summary, storage)
    return "\n".join(lines)


def _short(commit: str | None) -> str:
    return commit[:12] if commit and not commit.startswith("tree:") else commit or "unknown"


def _figures(summary: Mapping[str, Any]) -> list[str]:
    grounding, gate = summary["grounding"], summary["gate"]
    if grounding is None:
        return []
    return [
        "",
        f"Of {grounding['questions']:,} questions about pictures never seen in training, the model answers",
        f"  {grounding['accuracy']:6.1%} rightly with the right picture,",
        f"  {grounding['accuracy_shuffled_images']:6.1%} with another question's picture,",
        f"  {grounding['accuracy_no_image']:6.1%} without a picture.",
        "The distance between the first and the others is what it owes to looking.",
        f"Promotion: {'passed' if gate['passed'] else 'not passed'}. {gate['why']}",
    ]


def _mix(summary: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for stage in STAGES:
        for name, counts in summary.get("datasets", {}).get(stage, {}).items():
            seen = f"{counts['samples']:,} samples visited {counts['visited']:,} times"
            lines.append(f"  {stage}, dataset {name}: {seen}")
    return ["", *lines] if lines else []


def _not_as_they_are(summary: Mapping[str, Any]) -> list[str]:
    """Rows and samples that were not used, or not whole; nothing where all were."""
    words = {
        "quarantined": "quarantined",
        "noted": "used, but perhaps not as meant",
        "left_out": "left out",
        "changed": "changed, over all epochs",
    }
    lines = []
    for step, counts in summary.get("samples", {}).items():
        for key, what in words.items():
            if reasons := counts.get(key):
                told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
                lines.append(f"  {step}: {sum(reasons.values()):,} {what} ({told})")
    return ["", *lines] if lines else []


def _next(summary: Mapping[str, Any], storage: Storage) -> list[str]:
    lines: list[str] = []
    if summary["model"]:
        model = summary["model"]
        names = ", ".join(model["aliases"]) or "no alias"
        lines += ["", f"Registered as {model['name']} version {model['version']} ({names})."]
    if summary["mlflow"]:
        uri = summary["mlflow"]["tracking_uri"]
        lines += ["", "See the curves, the gallery and the lineage in MLflow:"]
        if uri.startswith(("http://", "https://")):
            lines.append(f"  {uri} (experiment {summary['mlflow']['experiment']})")
        else:
            lines.append(f"  {program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}")
    if summary["export"]:
        lines += ["", f"Hugging Face LLaVA folder: {summary['export']}"]
    if summary["assistant"]:
        lines += [
            "Chat with the model:",
            f"  {program('rayva')} chat {shlex.quote(summary['assistant'])} --image PICTURE",
        ]
    lines.append(f"All of this for programs: {storage.uri(SUMMARY)}")
    return lines
