"""Shows a training stage's plan: steps, samples by dataset, and which samples a step holds.

The run's steps up to `features` must be finished. Nothing is written. With --audit all steps are gone
through, and every sample's visits counted: exit code 1 if the plan does not hold what it promises.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayva.errors import RayvaError
from rayva.progress import Progress
from rayva.recipes.load import from_dict, merge, parse_override
from rayva.steps import RECIPE, command_to_go_on
from rayva.storage import Storage
from rayva.training.audit import EpochAudit, audit
from rayva.training.dataset import SampleSource
from rayva.training.plan import Part, TrainingPlan

if TYPE_CHECKING:
    from torch import Tensor

_FAULTY = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", required=True, help="folder or URI of a run, which holds its recipe.json"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    parser.add_argument("--stage", choices=["pretrain", "finetune"], default="finetune")
    parser.add_argument(
        "--step", type=int, metavar="N", help="also show the ids of this step's samples; metrics begin at 1"
    )
    parser.add_argument("--audit", action="store_true", help="prove exactly-once by counting every visit")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    source, plan = _load(options.storage, options.overrides, options.stage)
    told = _figures(source, plan)
    if options.step is not None:
        if not 1 <= options.step <= plan.steps_total:
            raise RayvaError(f"There is no step {options.step}.", f"choose one of 1 to {plan.steps_total}")
        indices = plan.global_batch(options.step - 1)
        told["step"] = {
            "step": options.step,
            "epoch": plan.epoch_of(options.step - 1) + 1,
            "sample_ids": [source.sample_id(index) for index in indices],
        }
    found = _audit(plan) if options.audit else None
    if found is not None:
        told["audit"] = [
            {"epoch": one.epoch + 1, "steps": one.steps, "visits": one.visits, "faults": one.faults}
            for one in found
        ]
    print(json.dumps(told, indent=1) if options.json else "\n".join(_lines(options.stage, told)))
    return _FAULTY if found is not None and any(one.faults for one in found) else 0


def _load(root: str, overrides: Sequence[str], stage: str) -> tuple[SampleSource, TrainingPlan]:
    # Slow to import.
    import torch

    from rayva.model.language import load_tokenizer
    from rayva.orchestration.pipeline import make_plan
    from rayva.training.stage import StageWork, pretrained, samples_and_plan

    storage = Storage(root)
    if not storage.exists(RECIPE):
        raise RayvaError(
            f"{storage.root} holds no run (no {RECIPE}).", "give the --storage that it was started with"
        )
    settings: dict[str, Any] = storage.read_json(RECIPE)
    for override in overrides:
        settings = merge(settings, parse_override(override))
    recipe = from_dict(settings)
    steps = {planned.step.name: planned for planned in make_plan(recipe, storage)}
    for name in ("weights", "data", "features"):
        if steps[name].manifest is None:
            raise RayvaError(
                f"The step {name} is not finished ({steps[name].why}).",
                f"finish it with: {command_to_go_on(storage, '--until', 'features', *overrides)}",
            )
    planned = steps[stage]
    work = StageWork(recipe, "pretrain" if stage == "pretrain" else "finetune", storage, planned.folder,
                     planned.inputs)  # fmt: skip
    tokenizer = load_tokenizer(*pretrained(work, "language"))
    unread = _Unread(int(planned.inputs["features"].outputs["tokens"]))
    return samples_and_plan(work, tokenizer, lambda _: unread, torch.device("cpu"), keep_lengths=False)


class _Unread:
    """Features whose number alone is asked for."""

    encodes = False

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        """Never called: no batch is made."""
        raise NotImplementedError


def _figures(source: SampleSource, plan: TrainingPlan) -> dict[str, Any]:
    return {
        "samples": plan.num_samples,
        "left_out": {reason: count for reason, count in source.left_out.items() if count},
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "steps": plan.steps_total,
        "steps_per_epoch": plan.steps_per_epoch,
        "samples_per_epoch": plan.samples_per_epoch,
        "visits": plan.samples_total,
        "datasets": [
            {"name": part.name, "samples": part.samples, "weight": part.weight, "per_epoch": part.visits}
            for part in plan.parts or (Part("", plan.num_samples),)
        ],
    }


def _audit(plan: TrainingPlan) -> list[EpochAudit]:
    progress = Progress("audit", plan.steps_total, "steps")
    found = audit(plan, progress.advance)
    progress.close()
    return found


def _lines(stage: str, told: dict[str, Any]) -> list[str]:
    lines = [
        f"{stage}: {told['steps']:,} steps of {told['batch_size']:,} samples; {told['epochs']:g} epochs of "
        f"{told['steps_per_epoch']:,} steps, {told['samples_per_epoch']:,} samples",
    ]
    for part in told["datasets"]:
        name = f"dataset {part['name']}" if part["name"] else "one dataset"
        size = f"{part['samples']:,} samples, weight {part['weight']:g}, {part['per_epoch']:,} an epoch"
        lines.append(f"  {name}: {size}")
    lines += [f"  left out: {count:,} {reason}" for reason, count in told["left_out"].items()]
    if "step" in told:
        step = told["step"]
        lines.append(f"step {step['step']:,}, in epoch {step['epoch']}:")
        lines += [f"  {sample_id}" for sample_id in step["sample_ids"]]
    for one in told.get("audit", ()):
        visits = ", ".join(
            f"{count:,} of {name}" if name else f"{count:,}" for name, count in one["visits"].items()
        )
        verdict = "; ".join(one["faults"]) or "as promised"
        lines.append(f"audit of epoch {one['epoch']}: {one['steps']:,} steps, visits: {visits}: {verdict}")
    return lines
