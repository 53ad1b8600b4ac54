"""The command line on released files that the figures are recomputed from."""

from __future__ import annotations

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from rayva.cli import main


def rayva(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What the command line does and says; in this process, since a new one takes half a second to start."""
    given, out, err = [str(argument) for argument in arguments], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(given)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def figures(*arguments: object) -> dict[str, Any]:
    """What a successful command prints."""
    done = rayva(*arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
