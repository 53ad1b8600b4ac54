"""Trains one stage on the GPU and writes every step's metrics.

Arguments: JSON settings of the stage, the number of steps, the folder to write to and, on request, the step
after which the process kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.loop import train
from rayva.training.resume import Metrics
from tests.training.support import FolderHooks, scenes_job


@dataclass
class DyingHooks(FolderHooks):
    """Kills its process after a step, at once and without a word."""

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        self.metrics.append(metrics)
        if step == self.stop_after:
            os.kill(os.getpid(), signal.SIGKILL)


def main(settings: dict[str, Any], steps: int, folder: Path, dies_after: int | None) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    init_distributed(device)
    hooks = DyingHooks(folder / "checkpoints", dies_after)
    result = train(replace(scenes_job(steps, **settings), device=device), hooks)
    told = {"metrics": hooks.metrics, "precision": result.precision}
    (folder / "told.json").write_text(json.dumps(told))
    leave_distributed()


if __name__ == "__main__":
    main(
        json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]),
        int(sys.argv[4]) if len(sys.argv) > 4 else None,
    )  # fmt: skip
