"""Which code is running: the git commit, and an id of the very files."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).resolve().parents[1]
"""The folder `platform/` of the running code."""

REPOSITORY = SOURCE_ROOT.parent

HEAD_LOG = "cluster/head.log"
"""A link, kept in git, to git's own log of HEAD. Ray leaves `.git` out of what it uploads but follows
links to files, so that a job submitted with --working-dir carries its commit along."""

_SKIPPED = {"__pycache__"}


@cache
def code_version() -> dict[str, Any]:
    """The commit, whether files differ from it (None: not known), and the id of the source files.

    The commit is taken from RAYVA_COMMIT, from git, or from what a submitted job carries along; where none
    of these is there it is `tree:ID`. The id is git's own: `git rev-parse COMMIT:platform` prints it.
    """
    tree = tree_id(SOURCE_ROOT)
    commit, dirty = os.environ.get("RAYVA_COMMIT"), None
    if not commit and (REPOSITORY / ".git").exists():
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", "platform", "pipelines", "serve")
        dirty = None if changes is None else changes != ""
    if not commit:
        commit = commit_from_head_log(REPOSITORY / HEAD_LOG)
    return {"commit": commit or f"tree:{tree}", "dirty": dirty, "tree": tree}


def commit_from_head_log(path: Path) -> str | None:
    """The commit that HEAD was at last, from git's log of HEAD: "old new who when<tab>why" a line."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = lines[-1].split(" ", 2) if lines else []
    return fields[1] if len(fields) == 3 and len(fields[1]) in {40, 64} else None


def tree_id(folder: Path) -> str:
    """The id that git gives to a folder with these files (SHA-1 object format, no executables)."""
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        name = path.name.encode()
        if path.is_dir():
            if path.name in _SKIPPED or path.name.endswith(".egg-info"):
                continue
            below = tree_id(path)
            if below != _EMPTY:  # git keeps no empty folders
                # Git sorts folders as if their names ended in a slash.
                entries.append((name + b"/", b"40000 " + name + b"\0" + bytes.fromhex(below)))
        elif path.suffix != ".pyc":
            blob = _object_id("blob", path.read_bytes())
            entries.append((name, b"100644 " + name + b"\0" + bytes.fromhex(blob)))
    return _object_id("tree", b"".join(entry for _, entry in sorted(entries)))


def _object_id(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


_EMPTY = _object_id("tree", b"")


def _git(*arguments: str) -> str | None:
    """What git prints; None where git is missing or refuses (no commit yet, another owner's files)."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
