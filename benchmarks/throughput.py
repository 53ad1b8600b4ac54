"""Training throughput against the standard way, on this machine's CPU, in one run.

The standard way is Hugging Face's LlavaForConditionalGeneration under its Trainer: padded, images encoded
in every step, logits of all positions; once in random order and once grouped by length. Rayva's side is its
own training loop with features encoded beforehand, packed rows and the DeepSpeed engine; encoding is timed
too, and a first epoch that has to encode is reported. All sides have the same weights, data, global batch,
micro-batch, optimizer and precision; Rayva and the random order take the very same samples in the same
steps, and their losses are compared. With --compile, Rayva's training is measured once more with its setting
`compile`. Measurements run one after the other, each in its own process.

    python benchmarks/throughput.py                       # SmolLM2-135M's shape, CLIP ViT-L/14 at 224 px
    python benchmarks/throughput.py --language tiny --tower tiny --text-scale 0.2 --precision float32
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import bench_support as support
import numpy as np
import rayva_side
import synthetic
import torch
from lengths import TITLES, StageName, describe_lengths
from synthetic import Setting
from transformers.trainer_pt_utils import get_length_grouped_indices

_TITLE = "Training throughput against the standard way"
_POOL_BATCHES = 50
"""Batches in one of the groups that transformers sorts by length."""


def main() -> None:
    synthetic.run(_TITLE, _options(), _child, _measure, _body)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    # With eight samples at once the standard way needs more memory than 24 GiB.
    synthetic.add_options(parser, micro=4)
    parser.add_argument(
        "--encode-precision", choices=["float32", "bfloat16"], default="float32",
        help="of encoding beforehand (default: what the features step has on a CPU)",
    )  # fmt: skip
    parser.add_argument("--loader-workers", type=int, default=1, help="of the Trainer's data loader")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: all cores)")
    return synthetic.parse(parser)


def _measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    samples = (options.warm_up + options.steps) * options.batch_size
    pool = _POOL_BATCHES * options.batch_size
    synthetic.write_models(setting)
    synthetic.write_images(setting, pool)
    for name in options.stages:
        synthetic.write_samples(setting, name, f"{name}-plan", samples)
        synthetic.write_samples(setting, name, f"{name}-pool", pool)
    common = {"setting": setting.json(), "threads": options.threads}
    encoding = support.run_child(
        __file__,
        common | {"kind": "encode", "images": samples, "precision": options.encode_precision},
    )
    figures: dict[str, Any] = {"encoding": encoding, "stages": {}}
    for name in options.stages:
        figures["stages"][name] = _measure_stage(options, setting, name, common, encoding)
    return figures


def _measure_stage(
    options: argparse.Namespace, setting: Setting, name: StageName, common: dict[str, Any], encoding: Any
) -> dict[str, Any]:
    stage = synthetic.stage_changes(options) | {"compile": False}
    lengths = rayva_side.sample_lengths(setting, name, f"{name}-plan")
    plan = rayva_side.make_plan(len(lengths), rayva_side.stage_settings(name, **stage), name)
    planned = [index for step in range(plan.steps_total) for index in plan.global_batch(step)]
    pool = rayva_side.sample_lengths(setting, name, f"{name}-pool")
    grouped = _grouped_order(pool, options)
    work = common | {"name": name, "stage": stage, "warm_up": options.warm_up}
    hf = work | {"kind": "hf", "workers": options.loader_workers}
    rayva = work | {"kind": "rayva", "table": f"{name}-plan", "store": encoding["store"]}
    sides = {
        "random": support.run_child(__file__, hf | {"table": f"{name}-plan", "order": planned}),
        "grouped": support.run_child(__file__, hf | {"table": f"{name}-pool", "order": grouped}),
        "rayva": support.run_child(__file__, rayva),
    }
    if options.compile:
        sides["compiled"] = support.run_child(__file__, rayva | {"stage": stage | {"compile": True}})
    first = options.warm_up * options.batch_size
    for side in sides:
        table, order = (pool, grouped) if side == "grouped" else (lengths, planned)
        taken = [table[index] for index in order[first:]]
        sides[side] |= {
            "samples_per_second": len(taken) / sides[side]["seconds"],
            "cpu_seconds_per_sample": sides[side]["cpu_seconds"] / len(taken),
            "mean_tokens": float(np.mean(taken)),
        }
    for side, (table, order) in {"random": (lengths, planned), "grouped": (pool, grouped)}.items():
        sides[side]["padding"] = _padding([table[i] for i in order[first:]], options.micro_batch_size)
    rate = sides["rayva"]["samples_per_second"]
    sides["rayva"]["with_encoding"] = 1 / (1 / rate + 1 / encoding["images_per_second"])
    differences = [
        abs(ours - theirs) / abs(theirs)
        for side in ("rayva", "compiled")
        if side in sides
        for theirs, ours in zip(sides["random"]["losses"], sides[side]["losses"], strict=True)
    ]
    return {"lengths": describe_lengths(lengths), "sides": sides, "loss_difference": max(differences)}


def _grouped_order(lengths: Sequence[int], options: argparse.Namespace) -> list[int]:
    """Warm-up batches and then measured ones of an order grouped by length.

    The pool is one whole group of transformers' sampler, as it sorts 50 batches at once on a data set of
    real size; of its batches, the measured ones are spread evenly over short and long.
    """
    generator = torch.Generator().manual_seed(options.seed)
    size = options.batch_size
    order = get_length_grouped_indices(lengths, size, mega_batch_mult=_POOL_BATCHES, generator=generator)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    means = np.array([np.mean([lengths[i] for i in batch]) for batch in batches])
    chosen = [len(batches) // 2 + i for i in range(options.warm_up)]
    for stratum in np.array_split(np.arange(len(batches)), options.steps):
        chosen.append(int(stratum[np.argmin(np.abs(means[stratum] - means[stratum].mean()))]))
    return [index for batch in chosen for index in batches[batch]]


def _padding(lengths: Sequence[int], micro: int) -> float:
    """Share of padding where rows are padded to the longest of their micro-batch."""
    parts = [lengths[start : start + micro] for start in range(0, len(lengths), micro)]
    return 1 - sum(lengths) / sum(len(part) * max(part) for part in parts)


# --- the measuring processes ---


def _child(work: dict[str, Any]) -> None:
    support.set_threads(work["threads"])
    setting = Setting(**work["setting"])
    if work["kind"] == "encode":
        dtype = getattr(torch, work["precision"])
        made = rayva_side.encode_images(setting, setting.root, dtype, work["images"])
        support.tell(made | {"precision": work["precision"], "peak_bytes": support.peak_bytes()})
        return
    stage = rayva_side.stage_settings(work["name"], **work["stage"])
    result = _train_hf(work, setting, stage) if work["kind"] == "hf" else _train_rayva(work, setting, stage)
    support.tell(result | {"peak_bytes": support.peak_bytes()})


def _train_hf(work: dict[str, Any], setting: Setting, stage: Any) -> dict[str, Any]:
    import hf_standard

    from rayva.training.precision import resolve_precision

    dtype, why = resolve_precision(stage.precision, torch.device("cpu"))
    clock = hf_standard.train(
        setting, work["name"], work["table"], stage, work["order"], dtype, work["workers"]
    )
    first = work["warm_up"] - 1
    return {
        "seconds": clock.moments[-1] - clock.moments[first],
        "cpu_seconds": clock.cpu[-1] - clock.cpu[first],
        "losses": clock.losses,
        "precision": f"{dtype} ({why})",
    }


def _train_rayva(work: dict[str, Any], setting: Setting, stage: Any) -> dict[str, Any]:
    features = rayva_side.stored_features(setting, setting.root, work["store"])
    source = rayva_side.source_of(setting, work["name"], work["table"], features)
    return rayva_side.train_timed(setting, stage, source, work["name"], work["warm_up"])


# --- the report ---

_SIDES = {
    "random": "Hugging Face, random order",
    "grouped": "Hugging Face, grouped by length",
    "rayva": "Rayva, features stored",
    "compiled": "the same, compiled",
}


def _body(_: argparse.Namespace, figures: dict[str, Any]) -> str:
    encoding = figures["encoding"]
    rate, peak = encoding["images_per_second"], encoding["peak_bytes"] / support.MIB
    speed = f"{rate:.2f} images/s in {encoding['precision']}"
    first = f"Encoding beforehand, once: {speed}, peak memory {peak:,.0f} MiB."
    stages = [_stage_body(TITLES[name], stage) for name, stage in figures["stages"].items()]
    return "\n\n".join([first, *stages])


def _stage_body(title: str, stage: dict[str, Any]) -> str:
    sides = stage["sides"]
    compared = [sides[side] for side in ("random", "grouped", "rayva")]
    random, grouped, rate = (side["samples_per_second"] for side in compared)
    best, encoded = max(random, grouped), sides["rayva"]["with_encoding"]
    rows = [
        [
            label,
            f"{sides[side]['samples_per_second']:.3f}",
            f"{sides[side]['cpu_seconds_per_sample']:.2f}",
            f"{sides[side]['mean_tokens']:.0f}",
            f"{sides[side]['padding']:.1%}",
            f"{sides[side]['peak_bytes'] / support.MIB:,.0f}",
        ]
        for side, label in _SIDES.items()
        if side in sides
    ]
    header = ["", "samples/s", "CPU seconds a sample", "tokens a sample", "padding", "peak memory, MiB"]
    cpu = [side["cpu_seconds_per_sample"] for side in compared]
    facts = [
        f"**{rate / best:.2f} x** the better of the two, **{rate / random:.2f} x** the random order.",
        f"One epoch that has to encode first: {encoded:.3f} samples/s, {encoded / best:.2f} x and",
        f"{encoded / random:.2f} x. A step's loss differs from the random order's by at most",
        f"{stage['loss_difference']:.1e} (relative).",
        f"In CPU seconds: {min(cpu[:2]) / cpu[2]:.2f} x and {cpu[0] / cpu[2]:.2f} x.",
        f"Rayva waited for data {sides['rayva']['wait_share']:.1%} of the time.",
    ]
    if "compiled" in sides:
        fast = sides["compiled"]["samples_per_second"]
        facts.append(f"Compiled: **{fast / best:.2f} x** and **{fast / random:.2f} x**.")
    return f"""### {title}

Lengths: {stage["lengths"]}. Precision: {sides["rayva"]["precision"]}.

{support.table(header, rows)}

{" ".join(facts)}"""


if __name__ == "__main__":
    main()
