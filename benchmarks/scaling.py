"""One worker against two on this machine: gloo, one thread each, the same global batches.

Both sides are Rayva's training loop as `torchrun` runs it. Features come from a store of random ones,
which take as long to read. With as many cores as workers, what is missing from a factor of two is
communication, uneven shares, what every rank repeats in a step, and memory bandwidth that cores share.

    python benchmarks/scaling.py                          # SmolLM2-135M's shape, 1 and 2 workers
"""

from __future__ import annotations

import argparse
import socket
from typing import Any

import bench_support as support
import rayva_side
import synthetic
from lengths import TITLES
from synthetic import Setting

_TITLE = "Scaling from one worker to two"


def main() -> None:
    synthetic.run(_TITLE, _options(), _child, _measure, _body)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    synthetic.add_options(parser, micro=4, steps=3)
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--workers", type=int, nargs=2, default=[1, 2])
    return synthetic.parse(parser)


def _measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    samples = (options.warm_up + options.steps) * options.batch_size
    synthetic.make_tokenizer().save_pretrained(setting.file("tokenizer"))
    synthetic.write_images(setting, samples)
    common = {
        "setting": setting.json(),
        "stage": synthetic.stage_changes(options) | {"zero": options.zero},
        "store": rayva_side.write_random_store(setting, setting.root, samples)["store"],
        "warm_up": options.warm_up,
    }
    figures: dict[str, Any] = {}
    for name in options.stages:
        synthetic.write_samples(setting, name, name, samples)
        work = common | {"name": name}
        sides = [_run_workers(work, count) for count in options.workers]
        for side in sides:
            side["samples_per_second"] = side["steps"] * options.batch_size / side["seconds"]
        figures[name] = sides
    return figures


def _run_workers(work: dict[str, Any], count: int) -> dict[str, Any]:
    """Runs `count` ranks to their end; rank 0's figures, which are global."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared = address | {"OMP_NUM_THREADS": "1"}
    ranks = [
        support.start_child(__file__, work, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    results = [support.result_of(__file__, r.returncode, o) for r, o in zip(ranks, outputs, strict=True)]
    first: dict[str, Any] = results[0]
    return first | {"workers": count, "peak_bytes": max(result["peak_bytes"] for result in results)}


def _child(work: dict[str, Any]) -> None:
    support.set_threads(1)
    setting = Setting(**work["setting"])
    features = rayva_side.stored_features(setting, setting.root, work["store"])
    source = rayva_side.source_of(setting, work["name"], work["name"], features)
    stage = rayva_side.stage_settings(work["name"], **work["stage"])
    result = rayva_side.train_timed(setting, stage, source, work["name"], work["warm_up"])
    support.tell(result | {"peak_bytes": support.peak_bytes()})


def _body(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    few, many = options.workers
    rows = []
    for name, (one, two) in figures.items():
        gain = two["samples_per_second"] / one["samples_per_second"]
        pairs = zip(one["losses"], two["losses"], strict=True)
        difference = max(abs(a - b) / abs(a) for a, b in pairs)
        rates = [f"{side['samples_per_second']:.3f}" for side in (one, two)]
        rows.append([TITLES[name], *rates, f"{gain:.2f}", f"{gain * few / many:.0%}", f"{difference:.1e}"])
    counts = [f"{count} worker{'s' * (count > 1)}, samples/s" for count in options.workers]
    header = ["", *counts, "gain", "of linear", "losses differ by"]
    precision = next(iter(figures.values()))[0]["precision"]
    return f"Precision: {precision}. ZeRO {options.zero}.\n\n" + support.table(header, rows)


if __name__ == "__main__":
    main()
