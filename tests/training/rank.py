"""One rank of a plain distributed run: trains every given setting, writes losses and final weights.

Arguments: a JSON list of stage settings, and the folder to write to. The process group comes from the
environment, as torchrun sets it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rayva.training.engine import init_distributed
from rayva.training.loop import train
from tests.training.support import FolderHooks, tiny_job


def main(settings: list[dict[str, object]], folder: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    losses = []
    for index, setting in enumerate(settings):
        hooks = FolderHooks(folder / f"{index}-rank{os.environ['RANK']}")
        result = train(tiny_job(**setting), hooks)
        losses.append([metrics["loss"] for metrics in hooks.metrics])
        gathered = result.engine.gather(result.engine.model)
        if gathered is not None:
            torch.save(gathered, folder / f"{index}.pt")
        result.engine.close()
    (folder / f"losses-{os.environ['RANK']}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
