"""What the submitted jobs run: Ray's start-up, then one task on every node that says what it imports."""

import json
import os
import sys
from pathlib import Path

# As the scripts of pipelines/ do; this file lies two folders deeper.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayva.orchestration.startup import code_version, start_ray, stop_ray
from rayva.recipes import resolve
from rayva.storage import Storage


def describe() -> dict[str, str]:
    import platform

    import rayva
    import rayva.recipes

    return {
        "node": ray.get_runtime_context().get_node_id(),
        "rayva": rayva.__file__,
        "platform": platform.__file__,
        "cwd": os.getcwd(),
        "marker": (Path(rayva.__file__).parent / "marker.txt").read_text(),
    }


if __name__ == "__main__":
    start_ray(resolve("tiny", None, sys.argv[2:]), Storage(sys.argv[1]))
    task = ray.remote(num_cpus=0)(describe)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    answers = ray.get([task.options(scheduling_strategy=strategy).remote() for strategy in pinned])
    print("RESULT " + json.dumps({"code": code_version(), "nodes": nodes, "answers": answers}), flush=True)
    stop_ray()
