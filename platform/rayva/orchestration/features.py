"""The step `features`: every image of the data step, encoded once by the frozen vision tower.

    scan     images.parquet -> a key (sha256 of the bytes) for each image, on CPU tasks
    encode   keys that the store lacks: decode on CPU tasks -> tower on resident actors -> shards

Bad images go to quarantine.parquet with the reason. A run that was interrupted, or that has more
images than the last one, encodes only what the store lacks.
"""

from __future__ import annotations

import collections
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data.block import Block, BlockAccessor

from rayva.data.schema import REJECTED
from rayva.errors import DataError, RayvaError, WeightsError
from rayva.features.images import Failure, ImageTable, Limits
from rayva.features.shards import ShardWriter, to_float16
from rayva.features.store import FeatureStore, StoreLayout, prepare_store
from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.orchestration.ray_data import data_context
from rayva.progress import Progress, say
from rayva.recipes.schema import Features, Vision
from rayva.steps import StepFolder
from rayva.storage import Storage
from rayva.vision.preprocess import Preprocessing
from rayva.vision.towers import TowerDescription, describe_tower

if TYPE_CHECKING:
    from rayva.vision.towers import VisionTower

IMAGE_KEYS = pa.schema([("image_id", pa.string()), ("key", pa.string())])
_PLACE = [("row_group", pa.int64()), ("row", pa.int64())]
_SCANNED = pa.schema([*_PLACE, *((name, pa.string()) for name in ("image_id", "key", "reason", "detail"))])
_BATCHES_PER_TASK = 4
_APPENDS_IN_FLIGHT = 2
_DECODER_BYTES = 512 << 20
"""Memory of a decoder: its libraries, and the largest picture that `data.max_pixels` allows by default."""


@dataclass(frozen=True)
class TowerSource:
    """Where the tower is, so that any process of the cluster can load it."""

    weights: StepFolder
    path: str
    """A folder in `weights` if it exists there, else a local folder or a hub name."""
    revision: str | None
    vision: Vision

    def _arguments(self) -> dict[str, Any]:
        storage, rel = self.weights.storage, self.weights.join(self.path)
        inside = not self.path.startswith("/") and storage.exists(rel)
        return {
            "path": str(storage.localize(rel)) if inside else self.path,
            "kind": self.vision.kind,
            "layer": self.vision.layer,
            "image_size": self.vision.image_size,
            "aspect": self.vision.aspect,
            "revision": self.revision,
        }

    def describe(self) -> TowerDescription:
        """What the tower is, from its files."""
        return describe_tower(**self._arguments())

    def load(self, device: str, dtype: str) -> VisionTower:
        """The tower itself."""
        import torch

        from rayva.vision.towers import load_tower

        return load_tower(**self._arguments(), device=device, dtype=getattr(torch, dtype))


def run(ctx: StepContext) -> StepResult:
    """Fills the feature store (`features.mode=store`), or only checks the images (`inline`).

    Writes image_keys.parquet (image_id, key) and quarantine.parquet; every image of the data step is in
    exactly one of them.

    Raises:
        DataError: where no image at all can be used, or image ids are not unique.
        WeightsError: where the tower cannot be loaded, or its features do not fit float16.
    """
    recipe = ctx.recipe
    limits = Limits(recipe.data.max_pixels, recipe.data.max_bytes)
    table = ImageTable(ctx.storage, ctx.inputs["data"].join("images.parquet"), limits)
    weights = ctx.inputs["weights"]
    found = weights.outputs["vision"]
    source = TowerSource(weights, found["path"], found["revision"], recipe.vision)
    tower = source.describe()
    inline = recipe.features.mode == "inline"
    scanned = _scan(table, recipe.features, decode=inline)
    outputs: dict[str, Any] = {"store": None, "encoded_now": 0}
    if not inline:
        layout = StoreLayout(
            tower.num_tokens, tower.hidden_size, tower.describe(), _compute_dtype(recipe.features)
        )
        encoded, failures = _fill_store(table, scanned, source, tower, layout, recipe.features)
        scanned = _mark_failed(scanned, failures)
        outputs = {"store": layout.rel, "encoded_now": encoded}
    outputs |= _write_tables(ctx, scanned)
    outputs |= {"tokens": tower.num_tokens, "hidden": tower.hidden_size, "dtype": "float16"}
    quarantined = sum(outputs["quarantined"].values())
    say(
        f"  features: {outputs['images']:,} images ({outputs['unique']:,} different), "
        f"{outputs['encoded_now']:,} encoded now, {quarantined:,} quarantined"
    )
    metrics = {key: float(outputs[key]) for key in ("images", "unique", "encoded_now")}
    return StepResult(outputs, metrics | {"quarantined": float(quarantined)})


def _compute_dtype(features: Features) -> str:
    """GPUs compute in float16, which is also what is stored; CPUs have no fast half precision."""
    return "float16" if features.encoder_gpus > 0 else "float32"


def _pieces(places: pa.Table, rows: int) -> list[pa.Table]:
    """Cuts (row_group, row, ...) into tables of at most `rows` rows within one row group, for a task each."""
    groups = places.column("row_group").to_numpy()
    edges = [*np.flatnonzero(np.diff(groups, prepend=-1)).tolist(), len(groups)]
    return [
        places.slice(first, min(rows, end - first)).combine_chunks()
        for start, end in itertools.pairwise(edges)
        for first in range(start, end, rows)
    ]


def _scan(table: ImageTable, features: Features, decode: bool) -> pa.Table:
    """A key, or the reason why there is none, for each row of `table`, in the table's order (_SCANNED)."""
    counts = table.row_groups()
    places = pa.table(
        [
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.arange(0), *(np.arange(count) for count in counts)]),
        ],
        schema=pa.schema(_PLACE),
    )
    if places.num_rows == 0:
        return _SCANNED.empty_table()
    with data_context(1 << 20):
        dataset = ray.data.from_arrow(_pieces(places, features.batch_size * _BATCHES_PER_TASK)).map_batches(
            _scan_piece,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"table": table, "decode": decode},
            num_cpus=features.decoder_cpus,
        )
    parts = []
    with Progress("features: keys", places.num_rows, "images") as progress:
        for bundle in dataset.iter_internal_ref_bundles():
            for reference in bundle.block_refs:
                part = ray.get(reference)
                parts.append(part.cast(_SCANNED))
                progress.advance(part.num_rows)
    scanned = pa.concat_tables(parts).sort_by([("row_group", "ascending"), ("row", "ascending")])
    _check_once(places.num_rows, scanned)
    return scanned


def _scan_piece(piece: pa.Table, table: ImageTable, decode: bool) -> pa.Table:
    rows = piece.column("row").to_pylist()
    columns: list[list[str | None]] = [[], [], [], []]
    for row in table.read(piece.column("row_group")[0].as_py(), rows):
        key = row.key
        picture = row.decode(table.limits) if decode else None
        failure = key if isinstance(key, Failure) else picture if isinstance(picture, Failure) else None
        cells = (None, failure.reason, failure.detail) if failure else (key, None, None)
        for column, cell in zip(columns, (row.image_id, *cells), strict=True):
            column.append(cell)
    return pa.table([*piece.columns, *columns], schema=_SCANNED)


def _check_once(expected: int, scanned: pa.Table) -> None:
    if scanned.num_rows != expected:
        raise RuntimeError(f"{expected} images went in, {scanned.num_rows} came out")
    counts = pc.value_counts(scanned.column("image_id"))
    repeated = [item["values"] for item in counts.to_pylist() if item["counts"] > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} image ids occur more than once, {repeated[0]!r} among them.",
            "give every image an id of its own",
        )


def _fill_store(
    table: ImageTable,
    scanned: pa.Table,
    source: TowerSource,
    tower: TowerDescription,
    layout: StoreLayout,
    features: Features,
) -> tuple[int, dict[str, Failure]]:
    """Encodes each key that the store lacks, once.

    Returns how many were encoded, and the keys whose bytes are no usable picture.
    """
    store = prepare_store(table.storage, layout)
    new = _first_of_each(scanned, store)
    if new.num_rows == 0:
        return 0, {}
    dataset = _encoded(table, new, source, tower, features)
    with Progress("features: encode", new.num_rows, "images") as progress:
        written, failures = _write_shards(dataset, table.storage, layout, features, progress)
    after = FeatureStore.open(table.storage, layout.rel)
    keys = new.column("key").to_pylist()
    lost = [key for key in keys if (key in after) == (key in failures)]
    if lost or written + len(failures) != len(keys):
        raise RuntimeError(
            f"{len(keys)} images went to the encoders; {written} came out, {len(failures)} were bad, "
            f"and {len(lost)} are in neither place or in both"
        )
    return written, failures


def _first_of_each(scanned: pa.Table, store: FeatureStore) -> pa.Table:
    """The rows to encode: of each key that `store` lacks, the first."""
    keys = scanned.column("key").to_pylist()
    first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    wanted = sorted(row for key, row in first.items() if key not in store)
    return scanned.take(pa.array(wanted, pa.int64())).select(["row_group", "row", "image_id", "key"])


def _encoded(
    table: ImageTable, new: pa.Table, source: TowerSource, tower: TowerDescription, features: Features
) -> Dataset:
    """The lazy dataset of features: columns key, reason (empty if good), detail, feature [N, D] float16."""
    preprocessing = tower.spec.preprocessing
    batches = math.ceil(new.num_rows / features.batch_size)
    with data_context(block_bytes=features.batch_size * preprocessing.image_size**2 * 3):
        pixels = ray.data.from_arrow(_pieces(new, features.batch_size * _BATCHES_PER_TASK)).map_batches(
            _decode_piece,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "table": table, "preprocessing": preprocessing, "batch_size": features.batch_size
            },
            num_cpus=features.decoder_cpus,
            # Ray Data would fuse stages that ask for the same resources, and then an encoder would wait
            # for its own decoding. A claim on memory keeps them apart.
            memory=_DECODER_BYTES,
        )  # fmt: skip
        return pixels.map_batches(
            _Encoder,
            batch_size=features.batch_size,
            batch_format="numpy",
            fn_constructor_kwargs={
                "source": source, "digest": tower.digest, "dtype": _compute_dtype(features),
                "device": "cuda" if features.encoder_gpus > 0 else "cpu",
                "threads": max(1, int(features.encoder_cpus)),
            },
            # A fixed size: pools of GPU actors that should grow may never get their first actor.
            compute=ActorPoolStrategy(size=min(features.encoders, batches)),
            num_cpus=features.encoder_cpus,
            num_gpus=features.encoder_gpus,
        )  # fmt: skip


def _decode_piece(
    piece: pa.Table, table: ImageTable, preprocessing: Preprocessing, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Decodes some rows into batches of uint8 pixels [B, H, W, 3]; a bad row keeps its place, in black."""
    rows = table.read(piece.column("row_group")[0].as_py(), piece.column("row").to_pylist())
    keys = piece.column("key").to_pylist()
    side = preprocessing.image_size
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        pixels_BHW3 = np.zeros((len(batch), side, side, 3), np.uint8)
        reasons, details = [""] * len(batch), [""] * len(batch)
        for i, key in enumerate(batch):
            row = next(rows)
            if row.key != key:
                raise DataError(f"Image {row.image_id} has changed while it was read.", "run the step again")
            picture = row.decode(table.limits)
            if isinstance(picture, Failure):
                reasons[i], details[i] = picture.reason, picture.detail
            else:
                pixels_BHW3[i] = preprocessing.to_uint8([picture])[0]
        yield {"key": batch, "reason": reasons, "detail": details, "pixels": pixels_BHW3}


class _Encoder:
    """A resident tower on one actor."""

    def __init__(self, source: TowerSource, digest: str, dtype: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        # What an actor's constructor raises is lost when the actor dies of it; so it waits for a call.
        self.tower: VisionTower | RayvaError
        try:
            self.tower = self._load(source, digest, dtype, device)
        except RayvaError as error:
            self.tower = error

    def _load(self, source: TowerSource, digest: str, dtype: str, device: str) -> VisionTower:
        tower = source.load(device, dtype)
        if tower.digest != digest:
            raise WeightsError(
                f"This node's copy of {source.path} is not the driver's (the digests differ).",
                "put the same weights on every node, or on the shared storage",
            )
        return tower

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if isinstance(self.tower, RayvaError):
            raise self.tower
        tower, good_B = self.tower, batch["reason"] == ""
        feature_BND = np.zeros((len(good_B), tower.num_tokens, tower.hidden_size), np.float16)
        if good_B.any():
            encoded = tower.encode_uint8(batch["pixels"][good_B]).float().cpu().numpy()
            feature_BND[good_B] = to_float16(encoded, batch["key"][good_B].tolist())
        return {
            "key": batch["key"], "reason": batch["reason"], "detail": batch["detail"], "feature": feature_BND
        }  # fmt: skip


class _Writer:
    """Writes the features of one encoder's share of the images."""

    def __init__(self, storage: Storage, layout: StoreLayout, shard_rows: int) -> None:
        self._shards = ShardWriter(storage, layout.rel, layout.num_tokens, layout.hidden_size, shard_rows)

    def append(self, block: Block) -> tuple[int, dict[str, Failure]]:
        """Writes a block's good rows; returns how many, and its bad keys."""
        columns = BlockAccessor.for_block(block).to_numpy()
        good_B = columns["reason"] == ""
        keys = columns["key"]
        self._shards.write(keys[good_B].tolist(), columns["feature"][good_B])
        failed = zip(*(columns[name][~good_B] for name in ("key", "reason", "detail")), strict=True)
        return int(good_B.sum()), {key: Failure(reason, detail) for key, reason, detail in failed}

    def close(self) -> None:
        """Completes the last shard."""
        self._shards.close()


def _write_shards(
    dataset: Dataset, storage: Storage, layout: StoreLayout, features: Features, progress: Progress
) -> tuple[int, dict[str, Failure]]:
    """Hands blocks to the writers as they come. The features themselves never pass through this process.

    Writers are actors of their own, not a stage of the dataset, because only so can they be told that
    the last block has come.
    """
    actor = ray.remote(_Writer).options(num_cpus=0, scheduling_strategy="SPREAD")
    writers = [actor.remote(storage, layout, features.shard_rows) for _ in range(features.encoders)]
    in_flight: collections.deque[ray.ObjectRef[Any]] = collections.deque()
    written = 0
    failures: dict[str, Failure] = {}

    def settle(most: int) -> None:
        nonlocal written
        while len(in_flight) > most:
            rows, failed = ray.get(in_flight.popleft())
            written += rows
            failures.update(failed)
            progress.advance(rows + len(failed))

    for number, reference in enumerate(_blocks(dataset)):
        in_flight.append(writers[number % len(writers)].append.remote(reference))
        settle(_APPENDS_IN_FLIGHT * len(writers))
    settle(0)
    ray.get([writer.close.remote() for writer in writers])
    return written, failures


def _blocks(dataset: Dataset) -> Iterator[Any]:
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


def _mark_failed(scanned: pa.Table, failures: dict[str, Failure]) -> pa.Table:
    """Moves every image whose key failed, duplicates included, to the bad ones."""
    if not failures:
        return scanned
    rows = [
        {**row, "key": None, "reason": failures[row["key"]].reason, "detail": failures[row["key"]].detail}
        if row["key"] in failures
        else row
        for row in scanned.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=_SCANNED)


def _write_tables(ctx: StepContext, scanned: pa.Table) -> dict[str, Any]:
    """Writes image_keys.parquet and quarantine.parquet; returns the counts for the step's outputs."""
    good = scanned.filter(pc.is_valid(scanned.column("key")))
    bad = scanned.filter(pc.is_null(scanned.column("key")))
    rejected = pa.table(
        [["images"] * bad.num_rows, *(bad.column(name) for name in ("image_id", "reason", "detail"))],
        schema=REJECTED,
    )
    _write_parquet(ctx, "quarantine.parquet", rejected)
    _write_parquet(ctx, "image_keys.parquet", good.select(IMAGE_KEYS.names))
    reasons = collections.Counter(bad.column("reason").to_pylist())
    if bad.num_rows and not good.num_rows:
        raise DataError(
            f"None of the {bad.num_rows:,} images can be used: {_tally(reasons.items())}.",
            f"see {ctx.storage.uri(ctx.folder.join('quarantine.parquet'))}",
        )
    return {
        "images": good.num_rows,
        "unique": pc.count_distinct(good.column("key")).as_py(),
        "quarantined": dict(sorted(reasons.items())),
    }


def _tally(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts))


def _write_parquet(ctx: StepContext, name: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    ctx.storage.write_bytes(ctx.folder.join(name), sink.getvalue())
