"""The training step on one CUDA GPU: tokens/s, MFU and memory, and hours that the paper's stages would take.

Needs torch, transformers and this checkout, and nothing else: no Ray, no DeepSpeed, no network, no weights.

Stage 1 has the whole 7B shape with random weights: the language model is frozen, gradients flow through it to
the projector. Stage 2 trains as many layers as fit one GPU with all of AdamW's state (bf16 weights and
gradients, fp32 weights and moments: 16 bytes a parameter), which 8 GPUs share. Samples of lengths like
LLaVA's are packed into rows as in training; only supervised positions go through the LM head, in chunks.

Every trial runs in a process of its own, so that one that runs out of memory leaves nothing behind. Attention
(variable-length flash, flex), torch.compile, recomputation and rows at once are chosen by trial; all trials
are told.

MFU counts what the mathematics needs and nothing that is computed twice. Per real token and layer, with N
parameters in the layer's matrices: 6 N FLOPs where they are trained (2 N forward, 2 N for the gradient of the
input, 2 N for that of the weights), 4 N where they are frozen; likewise for the LM head, at supervised
positions only, and for the projector, at image positions only (4 N: its input needs no gradient). Causal
attention over a sample of t tokens: 2 t^2 x (heads x head size) forward and twice that backward, per layer.
Padding counts as nothing.

    python benchmarks/gpu_step.py                                      # one GPU, 7B shape
    python benchmarks/gpu_step.py --device cpu --shape tiny            # only tests the code
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_support as support
from gpu_search import Search
from gpu_shapes import HOURS, PEAK_TFLOPS, SHAPES, Shape, peak_of
from lengths import STAGES, TITLES, StageName

_TITLE = "The training step on one GPU"


def main() -> None:
    options = _options()
    if options.child:
        _child(json.loads(options.child))
        return
    started_on = support.machine()
    device = support.run_child(
        __file__, {"kind": "device", "device": options.device, "shape": options.shape}, _ENVIRONMENT
    )
    peak = options.peak_tflops or peak_of(device["name"])
    deadline = time.monotonic() + options.budget_seconds
    figures: dict[str, Any] = {"device": device, "peak_tflops": peak, "stages": {}}
    common = {"kind": "train", "device": options.device, "shape": options.shape, "seed": options.seed}
    for number, stage in enumerate(STAGES, 1):
        until = deadline - (deadline - time.monotonic()) * (len(STAGES) - number) / len(STAGES)
        search = Search(stage, options, device, _trial_runner(common, until))
        figures["stages"][stage] = {"trials": search.run(), "best": search.best}
        if options.profile and search.best:
            best = search.settings(search.best) | {"profile": True}
            profiled = support.run_child(__file__, common | best, _ENVIRONMENT)
            figures["stages"][stage]["kernels"] = profiled.get("kernels", [])
    support.report(options, _TITLE, _body(figures, SHAPES[options.shape]), figures, started_on)
    for stage in STAGES:
        if figures["stages"][stage]["best"] is None:
            sys.exit(f"{TITLES[stage]}: no trial could be measured")


_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Rows of changing fill would otherwise leave fragments near the limit of memory."""


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__ or "")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--row-tokens", type=int, default=2048, help="length of a packed row")
    parser.add_argument("--rows", type=int, default=4, help="rows a step that the search begins with")
    parser.add_argument("--depth", type=int, help="layers that stage 2 begins with (default: estimated)")
    parser.add_argument("--attention", nargs="+", choices=["varlen", "flex", "sdpa"], help="candidates")
    parser.add_argument("--no-compile", action="store_true", help="never use torch.compile")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a trial (default: 8)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those (default: 5)")
    parser.add_argument(
        "--budget-seconds", type=float, default=480, help="no new trial is begun later (default: 480)"
    )
    known = ", ".join(f"{name} {value:g}" for name, value in PEAK_TFLOPS.items())
    parser.add_argument("--peak-tflops", type=float, help=f"dense bf16 peak of the device; known: {known}")
    parser.add_argument("--text-scale", type=float, default=1.0, help="factor on text lengths")
    parser.add_argument("--profile", action="store_true", help="tell which kernels the best trials spend on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _trial_runner(common: dict[str, Any], until: float) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def run(settings: dict[str, Any]) -> dict[str, Any] | None:
        """One trial's result; None where its time is over."""
        if time.monotonic() > until:
            return None
        result: dict[str, Any] = support.run_child(__file__, common | settings, _ENVIRONMENT)
        return settings | result

    return run


def _child(work: dict[str, Any]) -> None:
    import gpu_trial

    support.tell(gpu_trial.describe(work) if work["kind"] == "device" else gpu_trial.train(work))


# --- the report ---


def _body(figures: dict[str, Any], shape: Shape) -> str:
    device, peak = figures["device"], figures["peak_tflops"]
    facts = [device["name"], f"{device['memory'] / 2**30:.0f} GiB free", f"torch {device['torch']}"]
    facts.append(f"{peak:g} TFLOP/s at its peak (dense bf16)" if peak else "peak not known (--peak-tflops)")
    if device["matmul_tflops"]:
        facts.append(f"{device['matmul_tflops']:.0f} TFLOP/s in a large matrix product")
    parts = [", ".join(facts) + "."]
    parts += [_stage(stage, figures["stages"][stage], peak) for stage in STAGES]
    encoding = device["images_per_second"]
    parts.append(f"The vision tower (CLIP ViT-L/14 at 224 px for 7B) encodes {encoding:,.0f} images/s.")
    if all(figures["stages"][stage]["best"] for stage in STAGES):
        parts.append(_hours(figures, shape))
    return "\n\n".join(parts)


def _mfu(trial: dict[str, Any], peak: float | None) -> str:
    return f"{trial['flops_per_second'] / (peak * 1e12):.1%}" if peak else "-"


def _stage(stage: StageName, found: dict[str, Any], peak: float | None) -> str:
    rows = []
    for trial in found["trials"]:
        settings = [
            str(trial["depth"]), str(trial["rows"]), trial["attention"], "yes" if trial["compile"] else "no",
            f"{trial['recompute']:.0%}",
        ]  # fmt: skip
        if trial["outcome"] != "measured":
            rows.append([*settings, trial["outcome"], "", "", ""])
            continue
        mark = "**" if trial is found["best"] else ""
        rows.append([
            *settings, f"{mark}{trial['tokens_per_second']:,.0f}{mark}", f"{mark}{_mfu(trial, peak)}{mark}",
            f"{trial['peak_bytes'] / 2**30:.1f}", f"{trial['padding']:.1%}",
        ])  # fmt: skip
    header = [
        "layers", "rows", "attention", "compiled", "recomputed", "tokens/s", "MFU", "memory, GiB", "padding",
    ]  # fmt: skip
    lengths = next((trial["lengths"] for trial in found["trials"] if "lengths" in trial), "")
    told = f"### {TITLES[stage]}\n\n{lengths}\n\n" + support.table(header, rows)
    if found.get("kernels"):
        shares = [[f"`{name[:90]}`", f"{share:.1%}"] for name, share in found["kernels"]]
        told += "\n\nWhere the best trial's time goes:\n\n" + support.table(["kernel", "share"], shares)
    return told


def _hours(figures: dict[str, Any], shape: Shape) -> str:
    best = {stage: figures["stages"][stage]["best"] for stage in STAGES}
    hours = {
        stage: samples * best[stage]["whole_flops_per_sample"] / best[stage]["flops_per_second"] / 8 / 3600
        for stage, samples in HOURS.items()
    }
    encoding = 675_000 / figures["device"]["images_per_second"] / 8 / 3600
    return (
        "By these figures, the paper's stages on 8 such GPUs would take "
        f"{hours['pretrain']:.2f} h (595,000 samples, one epoch) and {hours['finetune']:.2f} h "
        f"(158,000 samples, three epochs) with all {shape.layers} layers, and encoding their 675,000 images "
        f"{encoding:.2f} h. Communication between GPUs, reading, and saving are not in it."
    )


if __name__ == "__main__":
    main()
