"""One rank of a distributed run without Ray: trains every given case up to a step, and tells its losses.

Arguments: the folder that holds their checkpoints, and a JSON list of cases (`name`, `settings` of the stage,
`stop_after`). The process group comes from the environment, as torchrun sets it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.loop import train
from tests.training.support import FolderHooks, tiny_job


def run(case: dict[str, Any], root: Path, rank: int) -> None:
    hooks = FolderHooks(root / case["name"], stop_after=case.get("stop_after"))
    try:
        train(tiny_job(**case["settings"]), hooks)
    except InterruptedError:
        torch.distributed.barrier()  # every rank has stored its part before another run looks at it
    if rank == 0:
        with (root / f"{case['name']}.jsonl").open("a") as file:
            file.write(json.dumps([metrics["loss"] for metrics in hooks.metrics]) + "\n")


def main(root: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    for case in cases:
        run(case, root, int(os.environ["RANK"]))
    leave_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
