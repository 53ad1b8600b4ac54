"""Runs stages one after another under Ray Train, as the job's driver does, on nodes that can be taken away.

Arguments: storage root, and the cases (JSON), each with `name`, `stage`, `workers` (as in the recipe),
`steps` and `settings` of the stage; a case has a storage of its own, the root's folder of its name. Files in
the root steer: `lose` takes a node away as a power cut would, `drain` announces that a node goes, `grow`
adds one. The losses by step that the tracker was told go to the case's folder, a line for each step.
"""

from __future__ import annotations

import json
import os
import signal
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
from tests.elastic.support import stage_inputs, stage_recipe
from tests.training.stage_support import context

# A lost node is noticed after some seconds instead of half a minute.
_NOTICE = {
    "health_check_initial_delay_ms": 5000, "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10000, "health_check_failure_threshold": 3,
}  # fmt: skip
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class FileTracker:
    """Writes what it is told into a file of this driver's own."""

    def __init__(self, root: Path) -> None:
        self._file = (root / f"told-{time.time_ns()}.jsonl").open("a", buffering=1)

    def metrics_many(self, rows: Iterable[tuple[int, dict[str, float]]]) -> None:
        for step, metrics in rows:
            self._file.write(json.dumps([step, metrics["loss"]]) + "\n")


def steer(cluster: Cluster, nodes: list[Any], root: Path, ended: threading.Event) -> None:
    """Does what files ask for, each once, until the work has ended."""
    while not ended.wait(0.2):
        if (root / "lose").exists():
            (root / "lose").unlink()
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if (root / "drain").exists():
            (root / "drain").unlink()
            drain(nodes[-1].node_id, cluster.address)
        if (root / "grow").exists():
            (root / "grow").unlink()
            nodes.append(cluster.add_node(**NODE))


def drain(node_id: str, address: str) -> None:
    """What a cloud's notice of preemption ends up as."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=address)
    deadline_ms = int((time.time() + 600) * 1000)
    accepted, why = client.drain_node(node_id, reason, "the test takes it away", deadline_ms)
    print("drain", accepted, why, flush=True)


def run(root: Path, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        folder = root / case["name"]
        folder.mkdir(exist_ok=True)
        storage = Storage(str(folder))
        recipe = stage_recipe(case)
        step = run_pretrain if case["stage"] == "pretrain" else run_finetune
        inputs = stage_inputs(storage, case["stage"])
        tracker: Any = FileTracker(folder)
        result = step(context(storage, recipe, case["stage"], inputs, tracker))
        (folder / "result.json").write_text(json.dumps(result.outputs))


def main(root: Path, cases: list[dict[str, Any]]) -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="warning")
    failures: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            run(root, cases)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            ended.set()

    steering = (cluster, nodes, root, ended)
    if cases[0].get("in_main_thread"):  # as the job's steps do
        threading.Thread(target=steer, args=steering, daemon=True).start()
        work()
    else:
        threading.Thread(target=work, daemon=True).start()
        steer(*steering)  # a node can be added in the main thread only
    ray.shutdown()
    cluster.shutdown()
    sys.exit(bool(failures))


if __name__ == "__main__":
    # Shells start what runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A name for the sockets that fits, and a folder that goes with the test.
    os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
