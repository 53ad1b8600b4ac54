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
    (folder / manifest_name(rank)).write_bytes(_manifest(rank, files))


def _manifest(rank: int, files: dict[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "rank": rank, "files": files}, indent=1) + "\n").encode()


def read_progress(folder: Path) -> Progress:
    """Reads progress.json alone; `DamagedCheckpointError` where it is missing or of another format."""
    raw = _read_json(folder, PROGRESS)
    try:
        if raw.pop("format") != FORMAT:
            raise DamagedCheckpointError(f"{folder} is not of the format {FORMAT}")
        progress = Progress(**raw)
    except (KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder / PROGRESS} is damaged: {error}") from error
    wrong = [name for name, holds in _types(progress).items() if not holds]
    if wrong:
        raise DamagedCheckpointError(f"{folder / PROGRESS} is damaged: {', '.join(wrong)}")
    return progress


def _types(progress: Progress) -> dict[str, bool]:
    """Whether each field read from JSON is what it should be."""
    counts = progress.counts
    return {
        "step": _is_count(progress.step),
        "world_size": _is_count(progress.world_size) and progress.world_size > 0,
        "zero": _is_count(progress.zero),
        "dtype": isinstance(progress.dtype, str),
        "job_digest": isinstance(progress.job_digest, str),
        "counts": isinstance(counts, dict) and all(_is_count(count) for count in counts.values()),
        "loss": progress.loss is None or isinstance(progress.loss, (int, float)),
    }


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def verify(folder: Path) -> Progress:
    """Checks every file of a merged checkpoint against the manifests of all ranks.

    Raises `DamagedCheckpointError` naming the first file that is missing, changed, or not listed
    (an unlisted file might be loaded too).
    """
    progress = read_progress(folder)
    listed: set[str] = set()
    for rank in range(progress.world_size):
        files = _listed_files(folder, rank)
        for name, expected in files.items():
            _check_file(folder, name, expected)
        listed |= {*files, manifest_name(rank)}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(name for name in found - listed if not Path(name).name.startswith("."))
    if PROGRESS not in listed or unlisted:
        raise DamagedCheckpointError(f"{folder} holds files of no manifest: {unlisted or [PROGRESS]}")
    return progress


def _listed_files(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and sha256 by name, of a manifest that has not changed in a byte: nothing else vouches for it."""
    path = folder / manifest_name(rank)
    files = _read_json(folder, path.name).get("files")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise DamagedCheckpointError(f"{path} is damaged: it lists no files")
    try:
        same = path.read_bytes() == _manifest(rank, files)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if not same:
        raise DamagedCheckpointError(f"{path} is not what was written")
    return files


def _check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    try:
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        same = path.stat().st_size == expected.get("size") and _sha256(path) == expected.get("sha256")
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if not same:
        raise DamagedCheckpointError(f"{path} is not what was written: its size or sha256 differs")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing: the checkpoint was not finished") from error
    except (OSError, ValueError, RecursionError) as error:
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
