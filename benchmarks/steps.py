"""Time and memory of each step of a recipe, from one run of the whole job.

Memory is the sum of the proportional set sizes of the job's processes, Ray's own among them, sampled
every half second: pages that processes share are counted once. The object store counts as far as it is
used.

    python benchmarks/steps.py --recipe tiny --storage /tmp/steps-tiny
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_STEP = re.compile(r"^\[\d+/\d+\] (\w+):")
_SECONDS_BETWEEN_SAMPLES = 0.5
_MIB = 2**20


def main() -> None:
    options = _options()
    command = [
        sys.executable, str(ROOT / "pipelines" / "full.py"), "--recipe", options.recipe,
        "--storage", str(options.storage), *options.overrides,
    ]  # fmt: skip
    peaks = _peaks_by_step(command)
    summary = json.loads((options.storage / "summary.json").read_text(encoding="utf-8"))
    print("\n| step | seconds | peak memory, MiB |\n|---|---|---|")
    for name, stage in summary["stages"].items():
        # A step may be over before it was looked at.
        peak = f"{peaks[name] / _MIB:,.0f}" if name in peaks else "not sampled"
        print(f"| {name} | {stage['seconds']:.1f} | {peak} |")


def _options() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--storage", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    if options.storage.exists() and any(options.storage.iterdir()):
        parser.error(f"{options.storage} is not empty: finished steps would not be run, and not be measured")
    return options


def _peaks_by_step(command: list[str]) -> dict[str, int]:
    """Runs the job; peak bytes of its processes, by the step that it was at."""
    peaks: dict[str, int] = defaultdict(int)
    current, ended = "start", threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as job:

        def sample() -> None:
            while not ended.wait(_SECONDS_BETWEEN_SAMPLES):
                peaks[current] = max(peaks[current], _memory(job.pid))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        for line in job.stdout or ():
            print(line, end="", flush=True)
            found = _STEP.match(line)
            current = found.group(1) if found else current
        ended.set()
        sampler.join()
    if job.returncode:
        sys.exit(job.returncode)
    return peaks


def _memory(pid: int) -> int:
    """Bytes of a process and all below it; those that end meanwhile count as nothing."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


if __name__ == "__main__":
    main()
