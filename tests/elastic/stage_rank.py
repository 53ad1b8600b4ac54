"""One rank of stages that run without Ray and without a fault: what runs under Ray is compared with them.

Arguments: root and cases as those of `tests.elastic.ray_driver`. The process group comes from the
environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rayva.storage import Storage
from rayva.training.engine import init_distributed, leave_distributed
from rayva.training.loop import train
from rayva.training.stage import StageWork, prepare, write_outputs
from tests.elastic.support import stage_inputs, stage_recipe
from tests.training.stage_support import step_folder
from tests.training.support import FolderHooks


def run(root: Path, case: dict[str, Any]) -> None:
    folder = root / case["name"]
    storage, stage = Storage(str(folder)), case["stage"]
    if os.environ["RANK"] == "0":
        folder.mkdir()
        stage_inputs(storage, stage)
    torch.distributed.barrier()
    inputs = stage_inputs(storage, stage)
    work = StageWork(stage_recipe(case), stage, storage, step_folder(storage, stage), inputs)
    prepared = prepare(work, torch.device("cpu"))
    hooks = FolderHooks(folder / "checkpoints")
    result = train(prepared.job, hooks)
    write_outputs(work, prepared, result)
    if os.environ["RANK"] == "0":
        rows = [[step, metrics["loss"]] for step, metrics in enumerate(hooks.metrics, 1)]
        (folder / "told-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = storage.read_json(work.folder.join("result.json"))
        (folder / "result.json").write_text(json.dumps(made["outputs"]))


def main(root: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    for case in cases:
        run(root, case)
    leave_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
