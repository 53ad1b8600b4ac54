"""Features step against a plain loop that encodes the same images on the same machine, in the same run.

The plain loop reads the same table, decodes, resizes, encodes in batches with all cores, and keeps
nothing. The step does that in the pipeline, and writes, indexes and checks the store. Its time is the
whole step's, with the start of its actors; Ray itself is started before, as a job does once.

    python benchmarks/features.py --images 5000 --tower efficientnet_lite
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform")]
os.environ["PYTHONPATH"] = str(ROOT / "platform")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from rayva.data.schema import ImageRecord  # noqa: E402
from rayva.data.tables import read_records, write_records  # noqa: E402
from rayva.features.shards import to_float16  # noqa: E402
from rayva.features.store import FeatureStore  # noqa: E402
from rayva.recipes.schema import Features, Recipe, Vision  # noqa: E402
from rayva.steps import StepFolder  # noqa: E402
from rayva.storage import Storage  # noqa: E402
from rayva.vision.architecture import read_spec  # noqa: E402
from rayva.vision.decode import decode_image  # noqa: E402
from rayva.vision.efficientnet import EfficientNetLite0, save_efficientnet  # noqa: E402
from rayva.vision.towers import load_tower  # noqa: E402
from rayva.vision.vit import GridVit  # noqa: E402

DIFFERENT_PICTURES = 64
VITS = {
    "vit_s32": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 32},
    "vit_b32": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32},
    "vit_l14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14,
    },
}  # fmt: skip


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="rayva-bench-", dir=options.scratch) as root:
        storage = Storage(root)
        recipe = _recipe(options)
        folders = {name: StepFolder(storage, name, "0" * 64) for name in ("weights", "data", "features")}
        _make_tower(options.tower, Path(storage.path(folders["weights"].join("vision"))))
        folders["weights"].finish({"vision": {"path": "vision", "revision": None}}, {}, 0.0)
        table = folders["data"].join("images.parquet")
        count = write_records(storage, table, ImageRecord, _records(options.images, options.side))
        folders["data"].finish({"images": count}, {}, 0.0)
        plain = _plain_loop(storage, folders, recipe, options.threads)
        step = _features_step(storage, folders, recipe)
    print(json.dumps(_report(options, plain, step), indent=1))


def _options() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=480, help="shorter side of the pictures (default: 480)")
    parser.add_argument("--tower", choices=["efficientnet_lite", *VITS], default="efficientnet_lite")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores, help="of the plain loop (default: all cores)")
    parser.add_argument("--encoders", type=int, default=cores)
    parser.add_argument("--encoder-cpus", type=float, default=0.75)
    parser.add_argument("--encoder-gpus", type=float, default=0.0)
    parser.add_argument("--decoder-cpus", type=float, default=0.5)
    parser.add_argument("--scratch", help="folder for the run (default: the system's temporary folder)")
    return parser.parse_args()


def _recipe(options: argparse.Namespace) -> Recipe:
    efficientnet = options.tower == "efficientnet_lite"
    return Recipe(
        name="benchmark",
        vision=Vision(
            kind="efficientnet_lite" if efficientnet else "clip",
            path="vision",
            layer=-1 if efficientnet else -2,
            image_size=options.image_size,
        ),
        features=Features(
            batch_size=options.batch_size,
            encoders=options.encoders,
            encoder_cpus=options.encoder_cpus,
            encoder_gpus=options.encoder_gpus,
            decoder_cpus=options.decoder_cpus,
        ),
    )


def _make_tower(name: str, folder: Path) -> None:
    """A tower of the real shape with random weights: the time is the same."""
    torch.manual_seed(0)
    if name == "efficientnet_lite":
        save_efficientnet(folder, EfficientNetLite0().state_dict())
        return
    folder.mkdir(parents=True)
    processor = {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    config = {"model_type": "clip_vision_model", **VITS[name]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    network = GridVit(read_spec(folder, "clip", -1, None, "square"))
    small = {name: torch.randn(t.shape) * 0.02 for name, t in network.state_dict().items()}
    save_file(small, folder / "model.safetensors")


def _records(count: int, side: int) -> Iterator[ImageRecord]:
    """JPEG pictures of 4:3. Few are drawn; a number behind the end of the file makes each one different."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(min(count, DIFFERENT_PICTURES)):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 12, side // 9, 3), dtype=np.uint8))
        sink = io.BytesIO()
        coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
        drawn.append(sink.getvalue())
    for i in range(count):
        content = drawn[i % len(drawn)] + i.to_bytes(8, "big")
        yield ImageRecord(image_id=f"{i:08d}", split="train", content=content)


def _plain_loop(
    storage: Storage, folders: dict[str, StepFolder], recipe: Recipe, threads: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    vision = recipe.vision
    path = storage.path(folders["weights"].join("vision"))
    gpu = recipe.features.encoder_gpus > 0
    tower = load_tower(
        path, vision.kind, vision.layer, vision.image_size, vision.aspect,
        device="cuda" if gpu else "cpu", dtype=torch.float16 if gpu else torch.float32,
    )  # fmt: skip

    def encode(pixels: list[np.ndarray], ids: list[str]) -> int:
        half = to_float16(tower.encode_uint8(np.stack(pixels)).float().cpu().numpy(), ids)
        return len(half)

    encode([np.zeros((vision.image_size or 224,) * 2 + (3,), np.uint8)] * recipe.features.batch_size, ["0"])
    started = time.monotonic()
    done = 0
    pixels: list[np.ndarray] = []
    ids: list[str] = []
    for record in read_records(storage, folders["data"].join("images.parquet"), ImageRecord):
        pixels.append(tower.preprocessing.to_uint8([decode_image(record.content)])[0])
        ids.append(record.image_id)
        if len(pixels) == recipe.features.batch_size:
            done += encode(pixels, ids)
            pixels, ids = [], []
    if pixels:
        done += encode(pixels, ids)
    seconds = time.monotonic() - started
    return {"images": done, "seconds": seconds, "peak_rss_bytes": _own_peak()}


def _features_step(storage: Storage, folders: dict[str, StepFolder], recipe: Recipe) -> dict[str, float]:
    import ray

    from rayva.orchestration.features import run
    from rayva.orchestration.pipeline import StepContext

    ray.init(include_dashboard=False, object_store_memory=1 << 30, logging_level=logging.WARNING)
    inputs = {name: folders[name] for name in ("weights", "data")}
    # This step sends nothing to the tracker itself.
    context = StepContext(recipe, storage, folders["features"], inputs, tracker=None)  # type: ignore[arg-type]
    try:
        with _PeakMemory() as memory:
            started = time.monotonic()
            result = run(context)
            seconds = time.monotonic() - started
        bytes_per_image = result.outputs["tokens"] * result.outputs["hidden"] * 2
        assert len(FeatureStore.open(storage, result.outputs["store"])) == result.outputs["unique"]
    finally:
        ray.shutdown()
    return {
        "images": result.outputs["encoded_now"],
        "seconds": seconds,
        "peak_rss_bytes": memory.peak,
        "bytes_per_image": bytes_per_image,
    }


class _PeakMemory:
    """Largest sum of private and shared memory (PSS) over this process and all that it has started."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def _own_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(options: argparse.Namespace, plain: dict[str, float], step: dict[str, float]) -> dict[str, Any]:
    rates = {name: side["images"] / side["seconds"] for name, side in (("plain", plain), ("step", step))}
    return {
        "settings": {key: value for key, value in vars(options).items() if key != "scratch"},
        "cores": os.cpu_count(),
        "plain_loop": {**plain, "images_per_second": rates["plain"]},
        "features_step": {**step, "images_per_second": rates["step"]},
        "ratio": rates["step"] / rates["plain"],
    }


if __name__ == "__main__":
    main()
