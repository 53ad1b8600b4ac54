"""What the benchmarks share: child processes, the machine and the commit, Markdown."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ROOT / "platform"
if str(PLATFORM) not in sys.path:
    sys.path.insert(0, str(PLATFORM))

MIB = 2**20
_MARK = "RESULT "
"""Begins the line in which a child process tells its result; all else that it prints is for people."""


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the options that all scripts have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def run_child(script: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Any:
    """Runs `script --child SETTINGS` to its end and returns what it passed to `tell`."""
    started = time.monotonic()
    child = start_child(script, settings, env)
    try:
        output, _ = child.communicate()
    finally:
        child.kill()
    result = result_of(script, child.returncode, output)
    what = " ".join(str(settings[key]) for key in ("name", "kind", "side", "samples") if key in settings)
    print(f"measured {what} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return result


def start_child(
    script: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts `script --child SETTINGS`; its output is a pipe, its messages go to ours."""
    command = [sys.executable, script, "--child", json.dumps(settings)]
    paths = os.pathsep.join([str(PLATFORM), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    whole = os.environ | {"PYTHONPATH": paths} | dict(env or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=whole, cwd=ROOT)


def result_of(script: str, code: int, output: str) -> Any:
    """The result in a finished child's output; ends this process where the child failed."""
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    if code or not lines:
        sys.exit(f"{Path(script).name}: a measuring process ended with code {code}\n{output[-2000:]}")
    return json.loads(lines[-1].removeprefix(_MARK))


def tell(result: Any) -> None:
    """In a child: hands `result` (JSON data) to the parent."""
    print(_MARK + json.dumps(result), flush=True)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def set_threads(count: int) -> None:
    """Threads of torch's operators; 0 leaves torch's own choice, which is all cores."""
    if count:
        import torch

        torch.set_num_threads(count)


def commit() -> str:
    """The commit of this checkout; marked where files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> str:
    """Cores, memory and load of this machine, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} CPU cores, {memory:.0f} GiB of memory, load {load:.1f} at the start"


def command_line() -> str:
    """The command that started this script, as it belongs into the documentation."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return " ".join(["python", str(name), *sys.argv[1:]])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def section(title: str, body: str, started_on: str) -> str:
    """A section for docs/benchmarks.md, with its command, machine and commit."""
    where = f"`{command_line()}`, commit {commit()}, {time.strftime('%Y-%m-%d')}; {started_on}."
    return f"## {title}\n\n{where}\n\n{body}\n"


def report(options: argparse.Namespace, title: str, body: str, figures: Any, started_on: str) -> None:
    """Prints the section, and writes the figures where `--json` says."""
    print(section(title, body, started_on))
    if options.json:
        whole = {"command": command_line(), "commit": commit(), "machine": started_on, "figures": figures}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
