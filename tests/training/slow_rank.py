"""One rank of a distributed run of which rank 1 computes slowly: writes the metrics of each ZeRO stage.

Arguments: a JSON list of ZeRO stages, and the folder to write to. The process group comes from the
environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.loop import train
from tests.training.support import FolderHooks, tiny_job


def main(stages: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    rank, told = dist.get_rank(), []
    for zero in stages:
        job = tiny_job(zero=zero)
        if rank == 1:
            _slow_down(job.model.language.base_model.layers[0].mlp.down_proj)
        hooks = FolderHooks(folder / f"{zero}-{rank}")
        train(job, hooks).engine.close()
        told.append(hooks.metrics)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    leave_distributed()


def _slow_down(module: torch.nn.Module) -> None:
    """Adds a third of a second to every forward pass."""
    forward = module.forward

    def slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return forward(*arguments, **named)

    module.forward = slowly


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
