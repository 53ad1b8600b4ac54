"""Runs stage 2 on a cluster of its own, as the job's driver does. Arguments: storage root, workers."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import ray

from rayva.orchestration.training import run_finetune
from rayva.storage import Storage
from tests.training.stage_support import RecordingTracker, context, finished_inputs, pretrained, tiny_recipe

SAMPLES, STEPS = 160, 60


def main(root: str, workers: int) -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="warning",
        _temp_dir=tempfile.mkdtemp(prefix="ray", dir="/tmp"),
    )
    storage = Storage(root)
    inputs = finished_inputs(storage, SAMPLES)
    inputs["pretrain"] = pretrained(storage)
    recipe = tiny_recipe(workers, epochs=STEPS * 8 / SAMPLES, checkpoint_every=5)
    tracker = RecordingTracker()
    result = run_finetune(context(storage, recipe, "finetune", inputs, tracker))
    assert result.outputs["steps"] == STEPS
    (Path(root) / f"told-{os.getpid()}.txt").write_text(" ".join(str(step) for step, _ in tracker.steps))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
