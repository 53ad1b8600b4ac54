"""Features from the store against features encoded in the training worker (`vision: inline`), in one run.

Both sides are Rayva's training loop on the same samples; each runs in its own process. Encoding beforehand is
timed as well, so that one epoch with an empty store can be compared honestly: over one epoch, inline and
stored encode the same images once, and the store gains from the second epoch, the second stage or the second
run on.

    python benchmarks/vision_modes.py                     # SmolLM2-135M's shape, CLIP ViT-L/14 at 224 px
"""

from __future__ import annotations

import argparse
from typing import Any

import bench_support as support
import rayva_side
import synthetic
import torch
from lengths import TITLES
from synthetic import Setting

_TITLE = "Stored against inline features"


def main() -> None:
    synthetic.run(_TITLE, _options(), _child, _measure, _body)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    synthetic.add_options(parser, steps=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: all cores)")
    return synthetic.parse(parser)


def _measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    samples = (options.warm_up + options.steps) * options.batch_size
    synthetic.write_models(setting)
    synthetic.write_images(setting, samples)
    common = {"setting": setting.json(), "threads": options.threads, "warm_up": options.warm_up}
    encoding = support.run_child(__file__, common | {"kind": "encode", "images": samples})
    stage = synthetic.stage_changes(options)
    figures: dict[str, Any] = {"encoding": encoding, "stages": {}}
    for name in options.stages:
        synthetic.write_samples(setting, name, name, samples)
        work = common | {"name": name, "stage": stage, "store": encoding["store"]}
        sides = {kind: support.run_child(__file__, work | {"kind": kind}) for kind in ("stored", "inline")}
        for side in sides.values():
            side["samples_per_second"] = side["steps"] * options.batch_size / side["seconds"]
        figures["stages"][name] = sides
    return figures


def _child(work: dict[str, Any]) -> None:
    support.set_threads(work["threads"])
    setting = Setting(**work["setting"])
    if work["kind"] == "encode":
        support.tell(rayva_side.encode_images(setting, setting.root, torch.float32, work["images"]))
        return
    if work["kind"] == "stored":
        features: Any = rayva_side.stored_features(setting, setting.root, work["store"])
    else:
        features = rayva_side.inline_features(setting, torch.float32)
    source = rayva_side.source_of(setting, work["name"], work["name"], features)
    stage = rayva_side.stage_settings(work["name"], **work["stage"])
    result = rayva_side.train_timed(setting, stage, source, work["name"], work["warm_up"])
    support.tell(result | {"peak_bytes": support.peak_bytes()})


def _body(_: argparse.Namespace, figures: dict[str, Any]) -> str:
    encoding = figures["encoding"]
    rows = []
    for name, sides in figures["stages"].items():
        stored, inline = (sides[kind]["samples_per_second"] for kind in ("stored", "inline"))
        first = 1 / (1 / stored + 1 / encoding["images_per_second"])
        pairs = zip(sides["stored"]["losses"], sides["inline"]["losses"], strict=True)
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        rates = [f"{stored:.3f}", f"{inline:.3f}", f"{stored / inline:.2f}", f"{first / inline:.2f}"]
        rows.append([TITLES[name], *rates, f"{sides['inline']['wait_share']:.1%}", f"{difference:.1e}"])
    header = [
        "", "stored, samples/s", "inline, samples/s", "ratio", "ratio of an epoch that fills the store",
        "inline waits", "losses differ by",
    ]  # fmt: skip
    return (
        f"Encoding beforehand: {encoding['images_per_second']:.2f} images/s. The store takes "
        f"{encoding['bytes_per_image'] / 1024:,.0f} KiB an image.\n\n" + support.table(header, rows)
    )


if __name__ == "__main__":
    main()
