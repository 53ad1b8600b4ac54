"""A checkpoint is what its ranks wrote, to the byte, or it is refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rayva.training.checkpoint import (
    DamagedCheckpointError,
    Progress,
    verify,
    write_manifest,
    write_progress,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A merged checkpoint of two ranks."""
    for rank in range(2):
        own = tmp_path / f"rank{rank}"
        (own / "engine").mkdir(parents=True)
        (own / "engine" / f"part{rank}.pt").write_bytes(bytes(range(50)))
        (own / "engine" / f"nothing{rank}").touch()
        if rank == 0:
            write_progress(own, Progress(4, 2, 0, "torch.float32", "job", {"samples": 3}, 1.5))
        write_manifest(own, rank)
        shutil.copytree(own, tmp_path / "merged", dirs_exist_ok=True)
    assert verify(tmp_path / "merged").step == 4
    return tmp_path / "merged"


def test_a_byte_changed_anywhere_is_seen(folder: Path) -> None:
    rng = random.Random(0)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for position, byte in enumerate(whole):
            for other in {byte ^ 1, 32, 9, 13, rng.randrange(256)} - {byte}:
                path.write_bytes(whole[:position] + bytes([other]) + whole[position + 1 :])
                with pytest.raises(DamagedCheckpointError):
                    verify(folder)
        path.write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize("damage", ["cut", "emptied", "longer", "folder", "another's"])
def test_a_file_that_is_not_the_one_written_is_named(damage: str, folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        if not whole and damage in {"cut", "emptied"}:
            continue
        if damage == "folder":
            path.unlink()
            path.mkdir()
        else:
            other = (folder / "engine" / "part0.pt").read_bytes() + b"\n"
            made = {"cut": whole[:-1], "emptied": b"", "longer": whole + b"\n", "another's": other}
            path.write_bytes(made[damage])
        with pytest.raises(DamagedCheckpointError, match=path.name):
            verify(folder)
        if damage == "folder":
            path.rmdir()
        path.write_bytes(whole)
