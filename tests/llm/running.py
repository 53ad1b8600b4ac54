"""Starts the test endpoint of `teacher.py` in a process of its own."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Running:
    """A running endpoint."""

    port: int
    process: subprocess.Popen[str]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            stats: dict[str, Any] = json.loads(answer.read())
        return stats

    @property
    def calls(self) -> int:
        return int(self.stats()["calls"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def teacher(folder: Path, **plan: Any) -> Iterator[Running]:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    script = str(Path(__file__).with_name("teacher.py"))
    process = subprocess.Popen([sys.executable, script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Running(int(process.stdout.readline()), process)
    finally:
        process.kill()
        process.wait()
