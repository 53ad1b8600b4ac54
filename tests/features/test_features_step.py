"""The features step on a Ray of its own: every image once, bad ones set aside, nothing encoded twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayva.data.schema import ImageRecord
from rayva.errors import DataError, WeightsError
from rayva.features.store import FeatureStore
from rayva.orchestration.faults import user_error
from rayva.recipes.schema import Data
from rayva.vision.decode import decode_image
from rayva.vision.towers import load_tower
from tests.features.features_job import Job, many, picture, sha256, start_ray
from tests.vision.test_decode import huge_png_header
from tests.vision.towers_for_tests import save_tower

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    # Short: a socket's path has room for 107 characters.
    folder = Path("/tmp") / f"rayva-features-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def own_ray(short: Path) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    start_ray(short)
    yield
    import ray

    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def mixed(folder: Path) -> tuple[list[ImageRecord], dict[str, str]]:
    """60 images, and the reasons of the bad ones: as bytes and files, alone and as duplicates."""
    good = [ImageRecord(f"g{i}", "train", content=picture(i)) for i in range(30)]
    for i in range(30, 42):
        (folder / f"a::{i}.jpg").write_bytes(picture(i, "JPEG", (64, 30)))
        good.append(ImageRecord(f"g{i}", "test", uri=str(folder / f"a::{i}.jpg")))
    copies = [ImageRecord(f"copy{i}", "train", content=picture(i % 4)) for i in range(12)]
    cut = picture(99)[:500]
    (folder / "empty.png").write_bytes(b"")
    bad = {
        "cut": (ImageRecord("cut", "train", content=cut), "truncated"),
        "cut again": (ImageRecord("cut again", "train", content=cut), "truncated"),
        "text": (ImageRecord("text", "train", content=b"404 Not Found"), "not_an_image"),
        "gone": (ImageRecord("gone", "train", uri=str(folder / "gone.jpg")), "missing"),
        "empty": (ImageRecord("empty", "train", uri=str(folder / "empty.png")), "truncated"),
        "no kind": (ImageRecord("no kind", "train", uri="nosuch://x/y.jpg"), "unreadable"),
        "no URI": (ImageRecord("no URI", "train", uri="s3://b/x::y.jpg"), "unreadable"),
        "huge": (ImageRecord("huge", "train", content=huge_png_header(9000, 9000)), "too_many_pixels"),
    }
    records = [*good, *copies, *(record for record, _ in bad.values())]
    order = np.random.default_rng(0).permutation(len(records))
    return [records[i] for i in order], {name: reason for name, (_, reason) in bad.items()}


def test_every_image_is_encoded_once_or_quarantined_with_its_reason(tmp_path: Path) -> None:
    job = Job(tmp_path)
    records, bad = mixed(tmp_path)
    job.set_images(records)
    outputs = job.run(Data(max_pixels=10**6))
    assert outputs["quarantined"] == dict(sorted(Counter(bad.values()).items()))
    assert (outputs["images"], outputs["unique"], outputs["encoded_now"]) == (54, 42, 42)

    keys = {row["image_id"]: row["key"] for row in job.table("image_keys")}
    quarantined = {row["row_id"]: row["reason"] for row in job.table("quarantine")}
    assert quarantined == bad
    assert list(keys) == [record.image_id for record in records if record.image_id not in bad]

    store = FeatureStore.open(job.storage, outputs["store"])
    assert store.verify() == {"shards": 3, "rows": 42, "keys": 42}
    tower = load_tower(str(job.tower), "clip", -2)
    assert store.manifest["tower"] == tower.describe()
    for record in records:
        if record.image_id not in bad:
            content = record.content or Path(record.uri or "").read_bytes()
            assert keys[record.image_id] == sha256(content)
            expected = tower.encode(tower.preprocess([decode_image(content)]))[0]
            stored = torch.tensor(store.read(keys[record.image_id])).float()
            torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)


def test_a_second_run_encodes_only_what_is_new(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.set_images(many(20))
    first = job.run(encoders=2)
    assert first["encoded_now"] == 20
    folder = tmp_path / first["store"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    job.set_images(many(25))
    second = job.run()
    assert (second["images"], second["encoded_now"], second["store"]) == (25, 5, first["store"])
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    assert job.run()["encoded_now"] == 0
    assert FeatureStore.open(job.storage, second["store"]).verify()["rows"] == 25


def test_inline_checks_the_images_and_stores_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    records, bad = mixed(tmp_path)
    job.set_images(records)
    outputs = job.run(Data(max_pixels=10**6), mode="inline")
    assert (outputs["store"], outputs["images"], outputs["encoded_now"]) == (None, 54, 0)
    assert {row["row_id"]: row["reason"] for row in job.table("quarantine")} == bad
    assert (outputs["tokens"], outputs["hidden"]) == (16, 48)
    assert not (tmp_path / "features").exists()


def test_no_images_at_all_is_fine_and_only_bad_ones_are_an_error(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.set_images([])
    assert job.run()["images"] == 0
    assert job.table("image_keys") == []
    job.set_images([ImageRecord("a", "train", content=b"x"), ImageRecord("b", "train", content=b"y")])
    with pytest.raises(DataError, match=r"None of the 2 images can be used: 2 not_an_image"):
        job.run()
    assert len(job.table("quarantine")) == 2
    job.set_images([ImageRecord("same", "train", content=picture(i)) for i in (1, 2)])
    with pytest.raises(DataError, match="'same'"):
        job.run()


def damaged_tower(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    save_tower("clip", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def enlarge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["vision_model.pre_layrnorm.weight"] *= 1e6


def remove(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["vision_model.pre_layrnorm.weight"]


@pytest.mark.parametrize(("change", "message"), [(enlarge, "float16 ends at 65504"), (remove, "Missing key")])
def test_what_an_encoder_cannot_do_stops_the_step_with_a_clear_error(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    # An absolute path outside the storage is a tower's place too.
    job = Job(tmp_path / "job", damaged_tower(tmp_path / "tower", change))
    job.set_images(many(4))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Ray's wrapper; what it wraps is checked
        job.run()
    error = user_error(caught.value, job.storage.root)
    assert isinstance(error, WeightsError)
    assert message in str(error)


def test_after_kill_9_only_what_is_missing_is_encoded(tmp_path: Path, short: Path) -> None:
    count = 600
    script = Path(__file__).with_name("features_job.py")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)])}
    command = [sys.executable, str(script), str(tmp_path), str(short / "k"), str(count)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("features/*/index/*.parquet"))) < 3:
            assert driver.poll() is None, "the step ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    job = Job(tmp_path)
    kept = len(
        FeatureStore.open(job.storage, next(tmp_path.glob("features/*")).relative_to(tmp_path).as_posix())
    )
    assert kept >= 48
    outputs = job.run()
    assert outputs["images"] == count
    assert outputs["encoded_now"] <= count - kept
    assert FeatureStore.open(job.storage, outputs["store"]).verify()["keys"] == count
    manifest = json.loads((tmp_path / outputs["store"] / "manifest.json").read_text())
    assert manifest["tower"]["layer"] == 2
