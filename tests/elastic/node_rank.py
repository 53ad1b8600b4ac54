"""One rank that opens a folder together with the others of its node, in several cases; tells what came of it.

Arguments: a folder that all ranks see. The process group comes from the environment, as torchrun sets it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from rayva.errors import StorageError
from rayva.training.checkpoint import DamagedCheckpointError
from rayva.training.nodes import node_folder

CASES: dict[str, dict[str, list[int]]] = {
    "one node": {},
    "two nodes": {"second_node": [2]},
    "a disk of its own": {"blind": [1]},
    "the first fails": {"fails": [0]},
    "the first is damaged": {"damaged": [0]},
    "one on another node fails": {"second_node": [2], "fails": [2]},
    "one that fetches its own fails": {"blind": [1], "fails": [1]},
}


def run(name: str, root: Path, rank: int) -> None:
    case = CASES[name]
    own_node = rank in case.get("second_node", [])
    os.environ["NODE_RANK"] = str(int(own_node))
    os.environ["LOCAL_RANK"] = "0" if own_node else str(rank)
    told: dict[str, object] = {"opened": False}

    @contextmanager
    def fetch() -> Iterator[Path]:
        told["opened"] = True
        if rank in case.get("fails", []):
            raise ConnectionError(f"rank {rank} has no route")
        if rank in case.get("damaged", []):
            raise DamagedCheckpointError("it was not finished")
        with tempfile.TemporaryDirectory(dir=root) as folder:
            (Path(folder) / "weights").write_text(str(rank))
            yield Path(folder)

    blind = patch.object(Path, "is_dir", return_value=False)
    try:
        with ExitStack() as stack:
            if rank in case.get("blind", []):
                stack.enter_context(blind)
            folder = stack.enter_context(node_folder(fetch, StorageError))
            told["read"] = (folder / "weights").read_text()
    except (StorageError, DamagedCheckpointError) as error:
        told["error"] = [type(error).__name__, str(error)]
    (root / f"{name} {rank}.json").write_text(json.dumps(told))
    dist.barrier()
    assert not [path for path in root.iterdir() if path.is_dir()], "copies are left"
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in CASES:
        run(each, Path(sys.argv[1]), int(os.environ["RANK"]))
    dist.destroy_process_group()
