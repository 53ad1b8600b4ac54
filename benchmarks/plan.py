"""The training plan at data sets of growing size: time to the first batch, time of any batch, memory.

Each size runs in a process of its own, which imports NumPy and the plan and nothing else: as one dataset, and
as a mix of three with fractional weights. "First batch" is counted from making the plan; importing NumPy and
the plan is told apart.

    python benchmarks/plan.py                             # 1e6, 1e8 and 1e10 samples
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import bench_support as support

_TITLE = "The training plan at large data sets"
_LOOKUPS = 50
_MIX = ((0.6, 1.0), (0.3, 0.5), (0.1, 2.5))
"""Share of the samples and weight of each dataset of the mix: 1.0 visits a sample in all."""


def main() -> None:
    options = _options()
    if options.child:
        support.tell(_measure(json.loads(options.child)))
        return
    started_on = support.machine()
    figures = [
        support.run_child(
            __file__, {"samples": int(size), "batch_size": options.batch_size, "datasets": datasets}
        )
        for size in options.samples
        for datasets in (1, len(_MIX))
    ]
    support.report(options, _TITLE, _body(options, figures), figures, started_on)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6, 1e8, 1e10])
    parser.add_argument("--batch-size", type=int, default=256, help="global batch (default: 256)")
    return parser.parse_args()


def _measure(work: dict[str, int]) -> dict[str, Any]:
    process = time.perf_counter()
    from rayva.training.plan import Part, TrainingPlan, deal

    started = time.perf_counter()
    settings = (work["batch_size"], 1.0, 0, "bench")
    if work["datasets"] == 1:
        plan = TrainingPlan(work["samples"], *settings)
    else:
        parts = [Part(f"d{n}", int(share * work["samples"]), w) for n, (share, w) in enumerate(_MIX)]
        plan = TrainingPlan.mixed(parts, *settings)
    first = plan.global_batch(0)
    first_seconds = time.perf_counter() - started
    steps = random.Random(0).sample(range(plan.steps_total), min(_LOOKUPS, plan.steps_total))
    started = time.perf_counter()
    for step in steps:
        batch = plan.global_batch(step)
        deal([1 + index % 1000 for index in batch], 8, -(-len(batch) // 8), 1)
    any_seconds = (time.perf_counter() - started) / len(steps)
    assert work["datasets"] > 1 or len(set(first)) == len(first)
    return {
        "samples": work["samples"],
        "datasets": work["datasets"],
        "first_batch_seconds": first_seconds,
        "import_seconds": started - process,
        "any_batch_seconds": any_seconds,
        "peak_bytes": support.peak_bytes(),
    }


def _body(options: argparse.Namespace, figures: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{size['samples']:.0e}",
            f"{size['datasets']}",
            f"{size['first_batch_seconds'] * 1e3:.2f}",
            f"{size['import_seconds'] * 1e3:.0f}",
            f"{size['any_batch_seconds'] * 1e3:.2f}",
            f"{size['peak_bytes'] / 1e6:.0f}",
        ]
        for size in figures
    ]
    header = [
        "samples",
        "datasets",
        "first batch, ms",
        "imports, ms",
        "any batch, dealt, ms",
        "peak memory, MB",
    ]
    mix = ", ".join(f"{share:.0%} with weight {weight:g}" for share, weight in _MIX)
    about = f"Global batch of {options.batch_size}, dealt to 8 ranks. The mix: {mix}.\n\n"
    return about + support.table(header, rows)


if __name__ == "__main__":
    main()
