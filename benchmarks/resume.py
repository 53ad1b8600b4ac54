"""How long training takes to go on after kill -9, against how long it takes to start at all.

Three processes train the same stage: one without a fault, one that is killed with SIGKILL a step after its
checkpoint, and one that goes on from there. Times are counted from the start of each process to its first
new step, imports and models included. The losses after the fault are compared with those without one.

    python benchmarks/resume.py                           # SmolLM2-135M's shape
"""

from __future__ import annotations

import argparse
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_support as support
import rayva_side
import synthetic
from lengths import TITLES
from synthetic import Setting

_TITLE = "Going on after a kill"


def main() -> None:
    synthetic.run(_TITLE, _options(), _child, _measure, _body)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    synthetic.add_options(parser, batch=8, steps=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: all cores)")
    return synthetic.parse(parser)


def _measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    saved = max(2, options.warm_up)
    samples = (saved + options.steps) * options.batch_size
    synthetic.make_tokenizer().save_pretrained(setting.file("tokenizer"))
    synthetic.write_images(setting, samples)
    store = rayva_side.write_random_store(setting, setting.root, samples)["store"]
    figures = {}
    for name in options.stages:
        synthetic.write_samples(setting, name, name, samples)
        stage = synthetic.stage_changes(options) | {"checkpoint_every": saved}
        models = {"setting": setting.json(), "name": name, "stage": stage}
        work = models | {"store": store, "threads": options.threads}
        fresh = _run(work | {"root": str(setting.file(f"{name}-whole"))}, kill_after=None)
        faulty = work | {"root": str(setting.file(f"{name}-killed"))}
        _run(faulty | {"wait_after": saved + 1}, kill_after=saved + 1)
        resumed = _run(faulty, kill_after=None)
        assert resumed["steps"][0] == saved + 1, "training did not go on from its checkpoint"
        identical = resumed["losses"] == fresh["losses"][saved:]
        figures[name] = {"fresh": fresh, "resumed": resumed, "bit_identical": identical}
    return figures


def _run(work: dict[str, Any], kill_after: int | None) -> dict[str, Any]:
    """Runs a training to its end, or kills it once that many steps are done and the checkpoint is stored."""
    started = time.time()
    process = support.start_child(__file__, work)
    moments, steps, losses, trained_from, saved = [], [], [], 0.0, False
    assert process.stdout is not None
    for line in process.stdout:
        kind, _, rest = line.partition(" ")
        if kind == "TRAIN":
            trained_from = float(rest) - started
        if kind == "STEP":
            step, moment, loss = rest.split()
            steps.append(int(step))
            moments.append(float(moment) - started)
            losses.append(float.fromhex(loss))
        saved = saved or kind == "SAVED"
        if kill_after is not None and saved and steps and steps[-1] == kill_after:
            process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        raise SystemExit(f"a training process ended with code {code}")
    return {"steps": steps, "losses": losses, "moments": moments, "train_called": trained_from}


@dataclass
class _TellingHooks(rayva_side.TimedHooks):
    wait_after: int | None = None

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        super().on_metrics(step, metrics)
        print(f"STEP {step} {time.time()} {metrics['loss'].hex()}", flush=True)
        if step == self.wait_after:
            time.sleep(3600)  # to be killed here, as soon as the checkpoint's upload is through

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        super().on_checkpoint(folder, step, metrics)
        print(f"SAVED {step}", flush=True)


def _child(work: dict[str, Any]) -> None:
    import torch

    from rayva.storage import Storage
    from rayva.training.engine import init_distributed
    from rayva.training.loop import train
    from rayva.training.store import CheckpointStore

    support.set_threads(work["threads"])
    setting = Setting(**work["setting"])
    init_distributed(torch.device("cpu"))
    features = rayva_side.stored_features(setting, setting.root, work["store"])
    source = rayva_side.source_of(setting, work["name"], work["name"], features)
    stage = rayva_side.stage_settings(work["name"], **work["stage"])
    store = CheckpointStore(Storage(work["root"]), "checkpoints", keep_last=2, keep_best=0)
    store.start()
    job = rayva_side.make_job(setting, stage, source, work["name"])
    print(f"TRAIN {time.time()}", flush=True)
    train(job, _TellingHooks(store, wait_after=work.get("wait_after")))


def _body(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    rows = []
    for name, runs in figures.items():
        totals = [runs[kind]["moments"][0] for kind in ("fresh", "resumed")]
        inside = [runs[kind]["moments"][0] - runs[kind]["train_called"] for kind in ("fresh", "resumed")]
        same = "yes, bit by bit" if runs["bit_identical"] else "NO"
        seconds = [f"{value:.1f}" for value in (*totals, *inside)]
        rows.append([TITLES[name], *seconds[:2], f"{totals[1] / totals[0]:.2f}", *seconds[2:], same])
    header = ["", "fresh, s", "killed, s", "ratio", "fresh, loop, s", "killed, loop, s", "same losses"]
    return (
        "To the end of the first new step after a fresh start and after a kill, global batch of "
        f'{options.batch_size}; "loop" leaves out imports and making the model.\n\n'
        + support.table(header, rows)
    )


if __name__ == "__main__":
    main()
