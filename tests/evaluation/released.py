"""Released files that the figures are recomputed from; tests are skipped where they are absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SCIENCEQA = SHARED / "scienceqa"
WILD = SHARED / "llava_bench_in_the_wild"
LLAVA_DATA = SHARED / "llava_data"


def needs(folder: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not folder.exists(), reason=f"needs the released files in {folder}")


def rayva(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, as a person calls it."""
    command = [sys.executable, "-m", "rayva.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "platform")},
    )


def figures(*arguments: object) -> dict[str, Any]:
    """What a successful command prints."""
    done = rayva(*arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
