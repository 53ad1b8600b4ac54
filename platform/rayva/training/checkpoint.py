"""Checkpoints: a folder of DeepSpeed's files, the position in the plan, and manifests of their hashes.

    engine/...                 DeepSpeed's files; it unpickles them, so nothing is loaded before the
                               manifests have been verified
    progress.json              position in the plan and counters
    manifest-RANK.json         sha256 and size of every file that this rank wrote, written last

Generator states need no place: each step seeds its generators from (seed, step, rank).
Every rank writes into a folder of its own; merged, these folders are the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayva.errors import StorageError

FORMAT = "rayva-checkpoint-1"
PROGRESS = "progress.json"


class DamagedCheckpointError(StorageError):
    """A checkpoint that is incomplete, changed, or not of this training."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: `step` optimizer steps are done; `counts` add up over the whole stage."""

    step: int
    world_size: int
    zero: int
    dtype: str
    job_digest: str
    counts: dict[str, int] = field(default_factory=dict)
    loss: float | None = None
    """Mean loss of the steps since the checkpoint before."""


def write_progress(folder: Path, progress: Progress) -> None:
    """Writes progress.json; rank 0 does."""
    text = json.dumps({"format": FORMAT, **asdict(progress)}, indent=1)
    (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")


def write_manifest(folder: Path, rank: int) -> None:
    """Lists every file under `folder`, which holds what this rank wrote and nothing else."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "rank": rank, "files": files}
    (folder / manifest_name(rank)).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Reads progress.json alone; `DamagedCheckpointError` where it is missing or of another format."""
    raw = _read_json(folder, PROGRESS)
    try:
        if raw.pop("format") != FORMAT:
            raise DamagedCheckpointError(f"{folder} is not of the format {FORMAT}")
        return Progress(**raw)
    except (KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder / PROGRESS} is damaged: {error}") from error


def verify(folder: Path) -> Progress:
    """Checks every file of a merged checkpoint against the manifests of all ranks.

    Raises `DamagedCheckpointError` naming the first file that is missing, changed, or not listed
    (an unlisted file might be loaded too).
    """
    progress = read_progress(folder)
    listed: set[str] = set()
    for rank in range(progress.world_size):
        files = _read_json(folder, manifest_name(rank)).get("files", {})
        for name, expected in files.items():
            _check_file(folder, name, expected)
        listed |= {*files, manifest_name(rank)}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(name for name in found - listed if not Path(name).name.startswith("."))
    if PROGRESS not in listed or unlisted:
        raise DamagedCheckpointError(f"{folder} holds files of no manifest: {unlisted or [PROGRESS]}")
    return progress


def _check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing")
    if path.stat().st_size != expected.get("size") or _sha256(path) != expected.get("sha256"):
        raise DamagedCheckpointError(f"{path} is not what was written: its size or sha256 differs")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing: the checkpoint was not finished") from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise DamagedCheckpointError(f"{path} is damaged: it holds no object")
    return raw


def manifest_name(rank: int) -> str:
    """The file that lists what a rank wrote."""
    return f"manifest-{rank:05d}.json"


def is_manifest(path: Path) -> bool:
    """Whether a file is one of `manifest_name`'s."""
    return path.name.startswith("manifest-") and path.suffix == ".json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
