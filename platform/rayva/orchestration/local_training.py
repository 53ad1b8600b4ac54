"""A training stage without Ray: in one process, or in those that torchrun starts.

It trains in the same step folder with the same loop and checkpoints as the job does: either goes on where
the other stopped. There is no tracker; figures go to the terminal and, on request, to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from rayva.errors import RayvaError, TrainingError
from rayva.lock import JobLock
from rayva.orchestration.console import USER_ERROR
from rayva.orchestration.entry import storage_root
from rayva.orchestration.pipeline import Planned, described, make_plan
from rayva.progress import Progress, say
from rayva.recipes import Recipe, require_runnable, resolve
from rayva.steps import AttemptClock
from rayva.storage import Storage
from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.loop import train
from rayva.training.resume import Metrics, SavedCheckpoint
from rayva.training.stage import ATTEMPTS, RESULT, StageWork, checkpoint_store, prepare, write_outputs
from rayva.training.store import CheckpointStore

_EPILOG = """\
The steps that the stage needs must be finished (pipelines/full.py --until features, or --until pretrain).
Afterwards the stage is a finished step: pipelines/full.py goes on behind it.

examples:
  python pipelines/train_local.py --recipe tiny --storage runs/demo --stage pretrain
  torchrun --nproc-per-node 2 pipelines/train_local.py --recipe tiny --storage runs/demo --stage finetune
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs pipelines/train_local.py. Exit code: 0 done, 2 an error to mend."""
    options = _parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = resolve(options.recipe, options.config, options.overrides)
        require_runnable(recipe)
        storage = Storage(storage_root(options.storage, recipe))
        planned = _planned(recipe, storage, options)
        if planned.manifest is not None:
            say(f"{options.stage} is finished: {storage.uri(planned.folder.rel)}")
            return 0
        _run(recipe, storage, planned, options, rank)
    except RayvaError as error:
        # What only one rank met, such as a damaged shard, is known to nobody else.
        who = f"rank {rank}: " if rank else ""
        print(f"{who}error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains one stage without Ray, alone or under torchrun.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--recipe", default="tiny", help="named recipe (default: tiny)")
    parser.add_argument("--storage", help="folder or URI of the run (default: runs/RECIPE in the checkout)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings to change")
    parser.add_argument("--stage", required=True, choices=["pretrain", "finetune"])
    parser.add_argument("--metrics", metavar="FILE", help="write each step's figures there, as JSON lines")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    return parser


def _planned(recipe: Recipe, storage: Storage, options: argparse.Namespace) -> Planned:
    plan = {planned.step.name: planned for planned in make_plan(recipe, storage)}
    stage: str = options.stage
    for name in plan[stage].step.needs:
        if plan[name].manifest is None:
            raise RayvaError(
                f"The step {name}, which {stage} needs, is not finished ({plan[name].why}).",
                f"finish it with: {_full_command(storage, options, name)}",
            )
    return plan[stage]


def _full_command(storage: Storage, options: argparse.Namespace, until: str) -> str:
    """The job with the very settings that this stage was given, up to the step `until`."""
    config = [] if options.config is None else ["--config", options.config]
    line = ["python", "pipelines/full.py", "--recipe", options.recipe, *config, "--storage", storage.root]
    return shlex.join([*line, "--until", until, *options.overrides])


def _run(recipe: Recipe, storage: Storage, planned: Planned, options: argparse.Namespace, rank: int) -> None:
    disable_progress_bar()
    device = _device(options.device)
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(JobLock(storage, f"{options.stage} of recipe {recipe.name}, without Ray"))
            storage.makedirs(planned.folder.rel)
            clock = stack.enter_context(AttemptClock(planned.folder))
        init_distributed(device)
        work = StageWork(recipe, options.stage, storage, planned.folder, planned.inputs)
        prepared = prepare(work, device)
        store = checkpoint_store(work)
        store.start()
        hooks = stack.enter_context(
            LocalHooks(store, work.name, prepared.job.plan.steps_total, options.metrics)
        )
        result = train(prepared.job, hooks)
        write_outputs(work, prepared, result)
        leave_distributed()
        if rank == 0:
            made = storage.read_json(planned.folder.join(RESULT))
            storage.delete(planned.folder.join(ATTEMPTS))
            about = described(recipe, planned)
            planned.folder.finish(made["outputs"], made["metrics"], clock.seconds, about)
    say(f"{options.stage} is finished: {storage.uri(planned.folder.rel)}")


def _device(wanted: str | None) -> torch.device:
    if (wanted or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= gpus:
        raise TrainingError(
            f"Process {place + 1} on this machine has no GPU of its own: there are {gpus}.",
            f"start no more than there are GPUs (torchrun --nproc-per-node {gpus}), or give --device cpu"
            if gpus
            else "give --device cpu",
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


class LocalHooks:
    """The training loop's surroundings: a terminal, perhaps a file, and the stage's checkpoints."""

    def __init__(self, store: CheckpointStore, what: str, steps_total: int, metrics: str | None) -> None:
        self._store, self._what, self._total = store, what, steps_total
        self._rank = dist.get_rank()
        self._progress: Progress | None = None
        self._file: IO[str] | None = None
        if metrics is not None and self._rank == 0:
            self._file = Path(metrics).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - in __exit__

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """Shows a step, and writes it."""
        if self._progress is None:
            self._progress = Progress(self._what, self._total, "steps", done=step - 1)
        speed = f"{metrics['tokens_per_second']:,.0f}/s"
        self._progress.advance(1, loss=metrics["loss"], tokens=speed)
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def on_checkpoint(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Stores this rank's part; rank 0 removes what is not kept any more."""
        self._store.keep(folder, step)

    def leaving(self) -> bool:
        """Nobody announces that here; SIGTERM is seen by the loop."""
        return False

    def checkpoints(self) -> Sequence[SavedCheckpoint]:
        """What earlier attempts stored, under Ray or not."""
        return self._store.checkpoints()

    def __enter__(self) -> LocalHooks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._file is not None:
            self._file.close()
