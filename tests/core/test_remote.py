"""Remote storage and inputs that cannot be reached, or let nobody in, are told in words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayva import lock
from rayva.data.caption_rows import read_rows
from rayva.data.json_rows import read_json_rows
from rayva.data.locations import is_folder, is_there, list_folder, open_input
from rayva.errors import DataError, RayvaError, StorageError
from rayva.evaluation.tasks.llava_bench import LlavaBench, LlavaBenchSettings, find_image
from rayva.lock import LOCK, JobLock
from rayva.orchestration.data import fingerprint
from rayva.orchestration.entry import main
from rayva.orchestration.exam import fingerprint as model_fingerprint
from rayva.orchestration.register import file_digests
from rayva.recipes.schema import Data, Recipe
from rayva.steps import AttemptClock, StepFolder
from rayva.storage import Storage
from tests.s3 import BUCKET, DeadPort, Server, closed_door, credentials

ROOT = f"s3://{BUCKET}/run"
USES: dict[str, Callable[[Storage, Path], Any]] = {
    "exists": lambda storage, _: storage.exists("x"),
    "list": lambda storage, _: storage.list("x"),
    "files": lambda storage, _: storage.files("x"),
    "digests of a model": lambda storage, _: file_digests(storage, "x"),
    "fingerprint of a model": lambda storage, _: model_fingerprint(storage),
    "makedirs": lambda storage, _: storage.makedirs("x"),
    "delete": lambda storage, _: storage.delete("x"),
    "open": lambda storage, _: storage.open("x"),
    "open to write": lambda storage, _: storage.open("x", "w"),
    "read_bytes": lambda storage, _: storage.read_bytes("x"),
    "write_bytes": lambda storage, _: storage.write_bytes("x", b"1"),
    "localize": lambda storage, _: storage.localize("x"),
    "upload": lambda storage, folder: storage.upload(folder, "x"),
    "check_writable": lambda storage, _: storage.check_writable(),
}
INPUTS: dict[str, Callable[[str], Any]] = {
    "open_input": lambda uri: open_input(uri, "data.captions"),
    "list_folder": lambda uri: list_folder(uri, "data.captions"),
    "is_folder": lambda uri: is_folder(uri, "data.captions"),
    "is_there": lambda uri: is_there(uri, "data.captions"),
    "captions": read_rows,
    "fingerprint": lambda uri: fingerprint(Recipe(name="r", data=Data(source="captions", captions=uri))),
}


@pytest.fixture(params=["no credentials", "nobody answers", "nobody is let in", "no URL"])
def trouble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A place that cannot be used; yields parts of the reason and of the remedy."""
    if request.param == "no credentials":
        credentials(monkeypatch, None)
        yield "Unable to locate credentials", "AWS_ACCESS_KEY_ID"
    elif request.param == "nobody answers":
        with DeadPort() as address:
            credentials(monkeypatch, address)
            yield "Could not connect", "AWS_ENDPOINT_URL"
    elif request.param == "no URL":
        credentials(monkeypatch, "localhost:9000")
        yield "Invalid endpoint: localhost:9000", "AWS_ENDPOINT_URL"
    else:
        with closed_door() as address:
            credentials(monkeypatch, address)
            yield "Forbidden", "AWS_ACCESS_KEY_ID"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(monkeypatch)
    yield server
    server.forget()


def test_a_storage_that_cannot_be_used_is_told(trouble: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    storage = Storage(ROOT)
    for name, use in USES.items():
        with pytest.raises(StorageError) as caught:
            use(storage, tmp_path)
        assert ROOT in caught.value.what, name
        assert trouble[0] in caught.value.what, name
        assert trouble[1] in caught.value.remedy, name


def test_an_input_that_cannot_be_used_is_told(trouble: tuple[str, str]) -> None:
    uri = f"s3://{BUCKET}/in/captions.jsonl"
    for name, use in INPUTS.items():
        with pytest.raises(DataError) as caught:
            use(uri)
        assert f"data.captions = {uri}" in caught.value.what, name
        assert trouble[0] in caught.value.what, name
        assert trouble[1] in caught.value.remedy, name


def test_a_benchmarks_folder_that_cannot_be_used_is_told(trouble: tuple[str, str]) -> None:
    folder = f"s3://{BUCKET}/bench"
    task = LlavaBench(LlavaBenchSettings(folder=folder))
    for setting, use in (
        ("llava_bench.folder", task.questions),
        ("llava_bench.images", lambda: find_image(folder, "1.jpg")),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert f"{setting} = {folder}/" in caught.value.what
        assert trouble[0] in caught.value.what
        assert trouble[1] in caught.value.remedy


@pytest.mark.parametrize("option", ["--dry-run", "--until=data"])
def test_a_script_ends_with_the_message(
    option: str, trouble: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"s3://{BUCKET}/in"
    for storage, settings, named in (
        (ROOT, [], ROOT),
        (str(tmp_path / "run"), ["data.source=captions", f"data.captions={uri}"], uri),
        (str(tmp_path / "run"), ["--config", f"{uri}/recipe.yaml"], f"{uri}/recipe.yaml"),
    ):
        assert main(argv=["--recipe", "tiny", "--storage", storage, option, *settings]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert all(part in error for part in (named, *trouble))


def test_a_file_that_goes_out_of_reach_while_it_is_read_or_written(server: Server) -> None:
    storage = Storage(ROOT)
    storage.write_bytes("x", b"123")
    storage.write_bytes("x.jsonl", b"{}\n")
    table = pa.table({"image": ["a.jpg"], "caption": ["A cat."]})
    with storage.open("x.parquet", "wb") as file:
        pq.write_table(table, file)
    with storage.open("x.parquet") as file, pq.ParquetFile(file) as parquet:
        assert parquet.read().equals(table)
    with storage.open("x.txt", "w") as file:
        file.write("é\n")
    assert list(storage.open("x.txt", "r")) == ["é\n"]

    with storage.open("x") as read, storage.open("x.parquet") as parquet_file:
        written = storage.open("y", "wb")
        written.write(b"456")
        server.stop()
        with pytest.raises(StorageError, match=f"{ROOT}/x cannot be used"):
            read.read()
        with pytest.raises(StorageError, match=r"x\.parquet cannot be used"):
            pq.ParquetFile(parquet_file)
        with pytest.raises(StorageError, match=f"{ROOT}/y cannot be used"):
            written.close()
    server.start()
    rows = read_json_rows(f"{ROOT}/x.jsonl", "data.captions")
    assert [row.value for row in rows] == [{}]
    with open_input(f"{ROOT}/x.jsonl", "data.captions") as file:
        server.stop()
        with pytest.raises(DataError, match=r"data\.captions = .*x\.jsonl cannot be read: Could not connect"):
            file.read()
    server.start()


def test_a_lock_and_a_clock_outlive_an_outage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.02)
    storage = Storage(ROOT)
    folder = StepFolder(storage, "data", "0" * 64)

    def wait_for_more(value: Callable[[], float]) -> None:
        before = value()
        while value() <= before:
            time.sleep(0.02)  # the test's own limit ends this

    with JobLock(storage), AttemptClock(folder, every=0.02):
        server.stop()
        with pytest.raises(RayvaError):
            storage.read_json(LOCK)
        time.sleep(0.3)  # some refreshes fail
        server.start()
        wait_for_more(lambda: json.loads(storage.read_bytes(LOCK))["refreshed"])
        wait_for_more(lambda: folder.attempts()[0])
