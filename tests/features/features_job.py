"""A small job up to the features step, and as a program that can be killed: python features_job.py ROOT."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from rayva.data.schema import ImageRecord
from rayva.data.tables import write_records
from rayva.recipes.schema import Data, Features, Recipe, Vision
from rayva.steps import StepFolder
from rayva.storage import Storage
from tests.vision.towers_for_tests import save_tower


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = (50, 40)) -> bytes:
    """An encoded picture that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, form)
    return sink.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Job:
    """Finished `weights` and `data` steps, and the features step on top of them."""

    def __init__(self, root: Path, tower: Path | None = None) -> None:
        self.storage = Storage(str(root))
        self.weights, self.data, self.features = (
            StepFolder(self.storage, name, "ab" * 32) for name in ("weights", "data", "features")
        )
        self.tower = tower or Path(self.storage.path(self.weights.join("vision")))
        if tower is None:
            save_tower("clip", self.tower)
        vision = {"path": str(tower) if tower else "vision", "kind": "clip", "revision": None, "digest": ""}
        self.weights.finish({"vision": vision}, {}, 0.0)

    def set_images(self, records: Iterable[ImageRecord]) -> None:
        write_records(self.storage, self.data.join("images.parquet"), ImageRecord, records)

    def run(self, data: Data | None = None, **features: Any) -> dict[str, Any]:
        """Runs the step; returns its outputs."""
        from rayva.orchestration.features import run
        from rayva.orchestration.pipeline import StepContext

        settings = {"batch_size": 8, "shard_rows": 16, "encoder_cpus": 0.5, "decoder_cpus": 0.5, **features}
        recipe = Recipe(name="test", vision=Vision(), data=data or Data(), features=Features(**settings))
        inputs = {"weights": self.weights, "data": self.data}
        # The step has nothing to tell the tracker itself.
        return run(StepContext(recipe, self.storage, self.features, inputs, cast(Any, None))).outputs

    def table(self, name: str) -> list[dict[str, Any]]:
        with self.storage.open(self.features.join(f"{name}.parquet")) as file:
            return pq.read_table(file).to_pylist()


def start_ray(temporary: Path) -> None:
    """A Ray of two CPUs for this process alone; `temporary` must be short, sockets lie in it."""
    import ray

    root = Path(__file__).parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root / "platform"), str(root)])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20,
        log_to_driver=False, _temp_dir=str(temporary),
    )  # fmt: skip


def many(count: int) -> Iterable[ImageRecord]:
    return (ImageRecord(f"m{i}", "train", content=picture(i)) for i in range(count))


if __name__ == "__main__":
    start_ray(Path(sys.argv[2]))
    job = Job(Path(sys.argv[1]))
    job.set_images(many(int(sys.argv[3])))
    job.run()
