"""One rank of a plain distributed run: trains every given setting, writes losses and sample ids by step.

Arguments: a JSON list of stage settings, the number of steps, and the folder to write to. The process group
comes from the environment, as torchrun sets it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayva.training import loop
from rayva.training.engine import init_distributed, leave_distributed
from tests.training.support import FolderHooks, scenes_job


@contextmanager
def seen_samples() -> Iterator[list[list[str]]]:
    """Sample ids of every step that is run meanwhile."""
    ids: list[list[str]] = []
    run_step = loop._run_step

    def noted(engine: Any, prepared: Any, *rest: Any) -> Any:
        ids.append(prepared.sample_ids)
        return run_step(engine, prepared, *rest)

    loop._run_step = noted
    yield ids
    loop._run_step = run_step


def main(settings: list[dict[str, object]], steps: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    told = []
    for index, setting in enumerate(settings):
        hooks = FolderHooks(folder / f"{index}-rank{os.environ['RANK']}")
        with seen_samples() as ids:
            result = loop.train(scenes_job(steps, **setting), hooks)
        told.append(([metrics["loss"] for metrics in hooks.metrics], ids))
        result.engine.close()
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
    leave_distributed()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
