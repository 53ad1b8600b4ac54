"""Runs a stage on a cluster of one head without CPUs and some nodes of one CPU, as the job's driver does.

Arguments: storage root, stage, workers (as in the recipe), steps, settings of the stage (JSON).
Files in the storage root steer it: `lose` takes a node away as a power cut would, `drain` announces that a
node goes, `grow` adds one. It writes the losses by step that its tracker was told, a line for each step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from rayva.orchestration.training import run_finetune, run_pretrain
from rayva.storage import Storage
from tests.training.stage_support import context, finished_inputs, pretrained, tiny_recipe

SAMPLES = 160


class FileTracker:
    """Writes what it is told into a file of this driver's own."""

    def __init__(self, root: Path) -> None:
        self._file = (root / f"told-{time.time_ns()}.jsonl").open("a", buffering=1)

    def metrics_many(self, rows: Iterable[tuple[int, dict[str, float]]]) -> None:
        for step, metrics in rows:
            self._file.write(json.dumps([step, metrics["loss"]]) + "\n")


def steer(cluster: Cluster, nodes: list[Any], root: Path) -> None:
    """Does what files ask for, each once."""
    while True:
        if (root / "lose").exists():
            (root / "lose").unlink()
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if (root / "drain").exists():
            (root / "drain").unlink()
            drain(nodes[-1].node_id, cluster.address)
        if (root / "grow").exists():
            (root / "grow").unlink()
            nodes.append(cluster.add_node(num_cpus=1))
        time.sleep(0.2)


def drain(node_id: str, address: str) -> None:
    """What a cloud's notice of preemption ends up as."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=address)
    deadline_ms = int((time.time() + 600) * 1000)
    accepted, why = client.drain_node(node_id, reason, "the test takes it away", deadline_ms)
    print("drain", accepted, why, flush=True)


def main(root: Path, stage: str, workers: Any, steps: int, settings: dict[str, Any]) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    most = workers[1] if isinstance(workers, list) else workers
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(most)]
    ray.init(address=cluster.address, logging_level="warning")
    threading.Thread(target=steer, args=(cluster, nodes, root), daemon=True).start()
    storage = Storage(str(root))
    inputs = finished_inputs(storage, SAMPLES)
    if stage == "finetune":
        inputs["pretrain"] = pretrained(storage)
    common = {"checkpoint_every": 5, "keep_checkpoints": 99} | settings
    recipe = tiny_recipe(most, epochs=steps * 8 / SAMPLES, **common)
    changes = {"workers": tuple(workers) if isinstance(workers, list) else workers}
    scaling = recipe.scaling.model_copy(update=changes | {"resize_seconds": 2.0, "max_failures": 9})
    recipe = recipe.model_copy(update={"scaling": scaling})
    run = run_pretrain if stage == "pretrain" else run_finetune
    result = run(context(storage, recipe, stage, inputs, FileTracker(root)))  # type: ignore[arg-type]
    (root / f"result-{os.getpid()}.json").write_text(json.dumps(result.outputs))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    # A name for the sockets that fits, and a folder that goes with the test.
    os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
