"""Two hundred damaged data files: each loads, has its bad rows counted, or is refused by name."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayva.data.coco import read_caption_boxes, read_coco
from rayva.data.schema import ImageRecord, Rejected
from rayva.data.tables import count_records, write_records
from rayva.errors import DataError
from rayva.orchestration.data import run
from rayva.recipes.schema import Data, Recipe
from rayva.steps import StepFolder
from rayva.storage import Storage

NAMES = [f"{n}.png" for n in range(6)]
SEEDS_A_FORM = 20


def llava_rows() -> list[Any]:
    def turns(question: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "Blue."}]

    rows: list[Any] = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?")} for n in NAMES]
    return [*rows, {"id": 7, "conversations": turns("\u56fe?")}]


def caption_rows() -> list[Any]:
    return [{"image": n, "captions": [f"A caf\u00e9, {n}.", "Another."]} for n in NAMES]


def box_rows() -> list[Any]:
    box = {"category": "cup", "bbox": [0.1, 0.1, 0.5, 0.5]}
    return [{"id": n, "image": n, "captions": ["A cup."], "instances": [box]} for n in NAMES]


def coco(section: str) -> Any:
    more = {"caption": "A cup."} if section == "captions" else {"category_id": 1, "bbox": [1, 1, 5, 5]}
    return {
        "images": [{"id": i, "file_name": n, "width": 9, "height": 9} for i, n in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i, **more} for i in range(len(NAMES))],
        "categories": [{"id": 1, "name": "cup"}],
    }


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")


def as_lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "surrogatepass") for r in rows)


def as_csv(rows: list[Any]) -> bytes:
    lines = [["image", "caption"], *([row["image"], row["captions"][0]] for row in rows)]
    return "".join(",".join(f'"{cell}"' for cell in line) + "\r\n" for line in lines).encode()


def as_parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def parquet_of_bytes(rows: list[Any]) -> bytes:
    return as_parquet([{**row, "image": {"bytes": row["image"].encode(), "path": None}} for row in rows])


VALUES = (
    *(None, True, -1, 1e308, 10**400, "", " ", "\0", "\ud800", "\u202e", "x" * 20_000, [], {}, [[]], [None]),
    *("../../etc/passwd", "/etc/passwd", "a/../../../x", "s3://", "nothing://x", "file://", "<image>" * 3),
)
BYTES = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b'"', b"{", b"]", b",", b"\\u", b"-", b"\n"),
    *(b"NaN", b"1e999"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """With one value replaced, removed, or repeated under its key."""
    *way, key = rng.choice(list(places(value)))
    target = value
    for step in way:
        target = target[step]
    if rng.random() < 0.25:
        del target[key]
    else:
        target[key] = rng.choice(VALUES)
    return value


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """Cut, with bytes inserted, removed or exchanged, in another encoding, nested, doubled, or empty."""
    at = rng.randrange(len(data))
    noise = rng.choice([*BYTES, bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 40])))])
    return rng.choice(
        [
            *(data[:at], data[:at] + noise + data[at:], data[:at] + noise + data[at + len(noise) :]),
            *(data[:at] + data[at + 5 :], data + data, b"", b"[" * 100_000 + data, b"\xef\xbb\xbf" + data),
            *(data.replace(b"{", b'{"id": 1, ', 3), data.replace(b'"', b"'"), data[at:] + data[:at]),
            *(data.decode("utf-8", "replace").encode(name) for name in ("utf-16", "utf-32-le", "utf-7")),
        ]
    )


Form = tuple[str, Callable[[], Any], Callable[[Any], bytes]]
FORMS: dict[str, Form] = {
    "llava": ("rows.json", llava_rows, as_json),
    "llava_lines": ("rows.jsonl", llava_rows, as_lines),
    "llava_gz": ("rows.json.gz", llava_rows, lambda rows: gzip.compress(as_json(rows), mtime=0)),
    "captions_lines": ("captions.jsonl", caption_rows, as_lines),
    "captions_csv": ("captions.csv", caption_rows, as_csv),
    "captions_parquet": ("captions.parquet", caption_rows, as_parquet),
    "captions_parquet_bytes": ("captions.parquet", caption_rows, parquet_of_bytes),
    "caption_boxes": ("boxes.jsonl", box_rows, as_lines),
    "coco_captions": ("captions_val.json", lambda: coco("captions"), as_json),
    "coco_instances": ("instances_val.json", lambda: coco("instances"), as_json),
}


def write_damaged(folder: Path, form: str, seed: int) -> Path:
    name, make, dump = FORMS[form]
    rng = random.Random(f"{form}/{seed}")
    folder.mkdir(parents=True)
    for image in NAMES:
        (folder / image).write_bytes(b"picture")
    content = make()
    try:
        data = dump(changed(content, rng) if seed % 2 and not form.endswith("csv") else content)
    except (pa.ArrowException, OverflowError, AttributeError, UnicodeEncodeError, TypeError, KeyError):
        data = dump(make())  # this change has no place in such a file: bytes are changed instead
        seed = 0
    (folder / name).write_bytes(data if seed % 2 else overwritten(data, rng))
    return folder / name


def load(form: str, path: Path, out: Path) -> Counter[str]:
    """Reads the file as the project does; returns the counts of refused rows by reason."""
    if form.startswith(("caption_boxes", "coco")):
        rejects: list[Rejected] = []
        folder = str(path.parent)
        if form == "caption_boxes":
            records = read_caption_boxes(str(path), folder, "train", rejects)
        else:
            other = path.parent / "other.json"
            other.write_bytes(as_json(coco("instances" if form == "coco_captions" else "captions")))
            pair = (path, other) if form == "coco_captions" else (other, path)
            records = read_coco(str(pair[0]), str(pair[1]), folder, "train", rejects)
        write_records(Storage(str(out)), "images.parquet", ImageRecord, records)
        return Counter(row.reason for row in rejects)
    data = (
        Data(source="llava", pretrain_json=str(path), finetune_json=str(path), test_fraction=0.2)
        if form.startswith("llava")
        else Data(source="captions", captions=str(path), test_fraction=0.2)
    )
    storage = Storage(str(out))
    step = StepFolder(storage, "data", "0" * 64)
    context: Any = SimpleNamespace(
        recipe=Recipe(name="r", data=data), storage=storage, folder=step, inputs={}, tracker=None
    )
    outputs = run(context).outputs
    assert outputs["finetune"] == count_records(storage, step.join("finetune.parquet"))
    return Counter(outputs["quarantined"])


@pytest.mark.parametrize("form", list(FORMS))
def test_damaged_files_load_or_are_named(form: str, tmp_path: Path) -> None:
    told: list[tuple[Path, DataError]] = []
    refused: list[Counter[str]] = []
    for seed in range(SEEDS_A_FORM):
        path = write_damaged(tmp_path / str(seed), form, seed)
        out = tmp_path / f"{seed}-out"
        try:
            refused.append(load(form, path, out))
        except DataError as error:
            told.append((path, error))
            left = [p for p in out.rglob("*") if p.is_file()]
            assert {p.suffix for p in left} <= {".parquet"}, seed  # no manifest: the step is not finished
            assert all(pq.read_table(p).num_rows >= 0 for p in left), seed
    assert all(str(path) in str(error) for path, error in told)
    assert all(error.remedy for _, error in told)
    assert len(told) + sum(map(bool, refused)) >= 7
    assert len(told) < SEEDS_A_FORM


def test_there_are_two_hundred() -> None:
    assert len(FORMS) * SEEDS_A_FORM >= 200
