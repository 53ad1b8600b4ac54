"""The ranks of a node share one copy of a checkpoint, and a copy that cannot be fetched fails on all."""

from __future__ import annotations

import json
from pathlib import Path

from tests.elastic.node_rank import CASES
from tests.elastic.support import PATIENCE_SECONDS, start_ranks

RANKS = 3
EXPECTED = {
    # For each rank: whether it opened a copy, and whose copy it read.
    "one node": [(True, "0"), (False, "0"), (False, "0")],
    "two nodes": [(True, "0"), (False, "0"), (True, "2")],
    "a disk of its own": [(True, "0"), (True, "1"), (False, "0")],
}
FAILURES = {
    "the first fails": ["StorageError", "rank 0 has no route"],
    "the first is damaged": ["DamagedCheckpointError", "it was not finished"],
    "one on another node fails": ["StorageError", "rank 2 has no route"],
    "one that fetches its own fails": ["StorageError", "rank 1 has no route"],
}


def test_ranks_of_a_node_share_a_copy_and_all_learn_of_a_failure(tmp_path: Path) -> None:
    ranks = start_ranks(RANKS, [str(tmp_path)], "tests.elastic.node_rank")
    assert [rank.wait(timeout=PATIENCE_SECONDS) for rank in ranks] == [0] * RANKS
    told = {
        name: [json.loads((tmp_path / f"{name} {rank}.json").read_text()) for rank in range(RANKS)]
        for name in CASES
    }
    for name, expected in EXPECTED.items():
        assert [(one["opened"], one["read"]) for one in told[name]] == expected, name
    for name, error in FAILURES.items():
        assert [one["error"] for one in told[name]] == [error] * RANKS, name
