"""The command line on released files that the figures are recomputed from."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.reference import ROOT


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
