"""The store: what is written is read back, whole shards survive a crash, damage is found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayva.errors import StorageError, WeightsError
from rayva.features.shards import ShardWriter, to_float16
from rayva.features.store import FeatureStore, StoreLayout, prepare_store
from rayva.storage import Storage

LAYOUT = StoreLayout(num_tokens=5, hidden_size=7, tower={"weights_sha256": "0" * 64}, compute_dtype="float32")


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def feature(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((5, 7)).astype(np.float16)


def write(storage: Storage, ids: range, shard_rows: int = 4) -> None:
    with ShardWriter(storage, LAYOUT.rel, 5, 7, shard_rows) as writer:
        for i in ids:
            writer.write([key(i)], feature(i)[None])


def opened(storage: Storage) -> FeatureStore:
    return FeatureStore.open(storage, LAYOUT.rel)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def test_round_trip(storage: Storage) -> None:
    assert len(prepare_store(storage, LAYOUT)) == 0
    write(storage, range(10))
    write(storage, range(10, 11))
    store = opened(storage)
    assert store.keys == sorted(key(i) for i in range(11))
    for i in range(11):
        np.testing.assert_array_equal(store.read(key(i)), feature(i))
    assert key(3) in store
    assert key(11) not in store
    with pytest.raises(KeyError):
        store.read(key(11))
    assert store.verify() == {"shards": 4, "rows": 11, "keys": 11}
    # The store can be prepared again, which changes nothing.
    assert prepare_store(storage, LAYOUT).keys == store.keys


def test_a_key_written_twice_is_one_key(storage: Storage) -> None:
    prepare_store(storage, LAYOUT)
    write(storage, range(4))
    write(storage, range(4))  # a retried task: the same shard again
    write(storage, range(2, 6))  # another run at the same time
    store = opened(storage)
    assert store.keys == sorted(key(i) for i in range(6))
    assert store.verify() == {"shards": 2, "rows": 8, "keys": 6}


def test_keys_that_end_in_zero_bytes_are_told_apart(storage: Storage) -> None:
    prepare_store(storage, LAYOUT)
    keys = ["ab" + "00" * 31, "ab00cd" + "00" * 29, "00" * 32]
    with ShardWriter(storage, LAYOUT.rel, 5, 7, 10) as writer:
        writer.write(keys, np.stack([feature(i) for i in range(3)]))
    store = opened(storage)
    assert store.keys == sorted(keys)
    for i, name in enumerate(keys):
        np.testing.assert_array_equal(store.read(name), feature(i))
    assert "ab00cd00" + "01" + "00" * 27 not in store


def test_any_arrow_reader_opens_a_shard(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    manifest = prepare_store(storage, LAYOUT).manifest
    write(storage, range(6))
    code = f"""
import json, sys, pyarrow as pa, pathlib
rows = {{}}
for file in pathlib.Path({storage.path(LAYOUT.rel)!r}).glob("shards/*.arrow"):
    reader = pa.ipc.open_file(str(file))
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        assert batch.num_rows == 1 and isinstance(batch.schema.field("feature").type, pa.FixedShapeTensorType)
        rows[batch["key"][0].as_py()] = batch["feature"].to_numpy_ndarray()[0].tolist()
assert not any(name.split(".")[0] in ("ray", "rayva", "torch") for name in sys.modules)
print(json.dumps(rows))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {key(i): feature(i).tolist() for i in range(6)}
    assert (manifest["num_tokens"], manifest["hidden_size"], manifest["dtype"]) == (5, 7, "float16")
    assert manifest["tower"] == LAYOUT.tower


def test_reads_of_a_local_store_are_views_of_the_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    write(storage, range(3))
    array = opened(storage).read(key(1))
    assert not array.flags.writeable
    assert not array.flags.owndata


_WRITER = """
import os, sys, numpy as np
sys.path.insert(0, {tests!r})
from test_store import LAYOUT, feature, key
from rayva.features.shards import ShardWriter
from rayva.features.store import prepare_store
from rayva.storage import Storage
storage = Storage({root!r})
prepare_store(storage, LAYOUT)
writer = ShardWriter(storage, LAYOUT.rel, 5, 7, 4)
for i in range(1000):
    writer.write([key(i)], feature(i)[None])
    print(i, flush=True)
    if i == {stop}:
        sys.stdin.read()
"""


def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    """kill -9 in the middle of the third shard: eight rows are kept, the rest is written by the next run."""
    tests = Path(__file__).parent
    code = _WRITER.format(tests=str(tests), root=str(tmp_path), stop=9)
    env = {**os.environ, "PYTHONPATH": str(tests.parents[1] / "platform")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert [int(process.stdout.readline()) for _ in range(10)] == list(range(10))
        process.send_signal(signal.SIGKILL)
    storage = Storage(str(tmp_path))
    shards = tmp_path / LAYOUT.rel / "shards"
    assert len(list(shards.iterdir())) == 3  # two whole ones, and a temporary one
    store = prepare_store(storage, LAYOUT)
    assert store.keys == sorted(key(i) for i in range(8))
    assert len(list(shards.iterdir())) == 2  # what the dead writer left is gone
    write(storage, range(8, 12))
    assert opened(storage).verify() == {"shards": 3, "rows": 12, "keys": 12}


def test_a_shard_without_its_index_part_is_taken_in(storage: Storage) -> None:
    prepare_store(storage, LAYOUT)
    write(storage, range(8))
    part = storage.list(f"{LAYOUT.rel}/index")[0]
    before = storage.read_bytes(f"{LAYOUT.rel}/index/{part}")
    storage.delete(f"{LAYOUT.rel}/index/{part}")
    assert len(opened(storage)) == 4
    assert len(prepare_store(storage, LAYOUT)) == 8
    assert storage.read_bytes(f"{LAYOUT.rel}/index/{part}") == before


def test_another_writers_temporary_file_is_left_alone(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    writer = ShardWriter(storage, LAYOUT.rel, 5, 7, 4)
    writer.write([key(0)], feature(0)[None])
    prepare_store(storage, LAYOUT)
    writer.close()
    assert opened(storage).keys == [key(0)]


@pytest.mark.parametrize("where", ["feature", "key", "footer"])
def test_a_flipped_byte_is_found(tmp_path: Path, where: str) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    write(storage, range(8))
    store = opened(storage)
    shard = sorted((tmp_path / LAYOUT.rel / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    inside = next(i for i in range(8) if feature(i).tobytes() in data)
    place = {
        "feature": data.find(feature(inside).tobytes()) + 11,
        "key": data.find(key(inside).encode()) + 5,
        "footer": len(data) - 20,
    }[where]
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StorageError, match=shard.name):
        store.verify()


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    write(storage, range(4))
    shard = next((tmp_path / LAYOUT.rel / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(StorageError, match=shard.name):
        opened(storage).read(key(3))
    shard.unlink()
    store = opened(storage)
    with pytest.raises(StorageError, match=shard.name):
        store.read(key(3))
    with pytest.raises(StorageError, match="missing"):
        store.verify()


def test_an_index_that_lies_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    write(storage, range(4))
    part = next((tmp_path / LAYOUT.rel / "index").iterdir())
    table = pq.read_table(part)
    swapped = table.set_column(0, "key", table["key"].take(pa.array([1, 0, 2, 3])))
    pq.write_table(swapped, part)
    with pytest.raises(StorageError, match="does not tell what it holds"):
        opened(storage).verify()
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(StorageError, match=part.name):
        opened(storage)


def test_stores_of_other_towers_and_precisions_are_other_stores(tmp_path: Path) -> None:
    others = [
        StoreLayout(5, 7, {"weights_sha256": "1" * 64}, "float32"),
        StoreLayout(5, 7, LAYOUT.tower, "float16"),
        StoreLayout(6, 7, LAYOUT.tower, "float32"),
    ]
    assert len({LAYOUT.rel, *(layout.rel for layout in others)}) == 4
    with pytest.raises(StorageError, match="no feature store"):
        FeatureStore.open(Storage(str(tmp_path)), LAYOUT.rel)


def test_values_beyond_float16_are_an_error_that_names_the_image() -> None:
    features = np.zeros((2, 5, 7), np.float32)
    features[1, 2, 3] = 65_504
    assert to_float16(features, ["a", "b"]).max() == 65_504
    for value in (70_000, -np.inf, np.nan):
        features[1, 2, 3] = value
        with pytest.raises(WeightsError, match="image b"):
            to_float16(features, ["a", "b"])


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ShardWriter(storage, LAYOUT.rel, 5, 7, 4) as writer:
        for wrong in (np.zeros((1, 7, 5), np.float16), np.zeros((1, 5, 7), np.float32)):
            with pytest.raises(ValueError, match="float16"):
                writer.write([key(0)], wrong)


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    writer = ShardWriter(storage, LAYOUT.rel, 5, 7, 4)
    with contextlib.suppress(RuntimeError), writer:
        writer.write([key(0)], feature(0)[None])
        raise RuntimeError
    assert list((tmp_path / LAYOUT.rel / "shards").iterdir()) == []
    assert len(opened(storage)) == 0


def test_a_store_opens_itself_again_in_another_process(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prepare_store(storage, LAYOUT)
    write(storage, range(3))
    again = pickle.loads(pickle.dumps(opened(storage)))
    np.testing.assert_array_equal(again.read(key(2)), feature(2))
