"""Records survive a round trip through Parquet, whatever is in them."""

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data import tables
from rayva.data.schema import ImageRecord, Instance, Question, Rejected, Sample, Turn
from rayva.errors import DataError, StorageError
from rayva.storage import Storage

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = texts.filter(bool)
sides = st.floats(0, 1)
records = {
    ImageRecord: st.builds(
        ImageRecord,
        ids,
        st.sampled_from(["train", "validation", "test"]),
        st.none() | texts,
        st.none() | st.binary(max_size=50),
        st.lists(texts, max_size=3).map(tuple),
        st.lists(st.builds(Instance, texts, st.tuples(sides, sides, sides, sides)), max_size=3).map(tuple),
    ),
    Sample: st.builds(
        Sample,
        ids,
        st.lists(ids, max_size=2).map(tuple),
        st.lists(st.builds(Turn, st.sampled_from(["human", "gpt"]), texts), max_size=4).map(tuple),
        ids,
    ),
    Question: st.builds(Question, ids, texts, ids, texts, texts, st.lists(texts, max_size=3).map(tuple)),
    Rejected: st.builds(Rejected, texts, texts, ids, texts),
}


@pytest.mark.parametrize("kind", list(records))
def test_records_come_back_equal_and_in_order(kind, tmp_path_factory):
    storage = Storage(str(tmp_path_factory.mktemp("tables")))

    @settings(deadline=None, max_examples=20)
    @given(st.lists(records[kind], max_size=8))
    def round_trip(written):
        assert tables.write_records(storage, "t.parquet", kind, written) == len(written)
        assert list(tables.read_records(storage, "t.parquet", kind)) == written
        assert tables.count_records(storage, "t.parquet") == len(written)

    round_trip()


def test_large_images_are_spread_over_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH_BYTES", 1000)
    storage = Storage(str(tmp_path))
    images = [ImageRecord(str(i), "train", content=bytes([i]) * 400) for i in range(10)]
    tables.write_records(storage, "images.parquet", ImageRecord, iter(images))
    assert pq.ParquetFile(tmp_path / "images.parquet").metadata.num_row_groups == 4
    assert list(tables.read_records(storage, "images.parquet", ImageRecord)) == images


def test_records_are_written_while_they_are_made(tmp_path, monkeypatch):
    """A generator is never run far ahead of what has been written."""
    monkeypatch.setattr(tables, "_BATCH_ROWS", 4)
    alive = 0
    most = 0

    class Counted(Rejected):
        def __init__(self, number):
            nonlocal alive, most
            super().__init__("s", str(number), "r")
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    total = tables.write_records(Storage(str(tmp_path)), "r.parquet", Rejected, map(Counted, range(400)))
    assert total == 400
    assert most < 20


def test_a_source_that_fails_leaves_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH_ROWS", 2)

    def failing():
        yield from (Rejected("s", str(n), "r") for n in range(7))
        raise DataError("the file ends here")

    storage = Storage(str(tmp_path))
    with pytest.raises(DataError, match="ends here"):
        tables.write_records(storage, "r.parquet", Rejected, failing())
    assert not list(tmp_path.iterdir())


def test_works_on_other_file_systems():
    storage = Storage("memory://tables-test")
    written = [Sample("a", ("x",), (Turn("human", "<image>\nq"), Turn("gpt", "a")))]
    tables.write_records(storage, "steps/s.parquet", Sample, written)
    assert list(tables.read_records(storage, "steps/s.parquet", Sample)) == written


def test_a_missing_damaged_or_foreign_table_is_a_storage_error(tmp_path):
    storage = Storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"no .*gone\.parquet"):
        list(tables.read_records(storage, "gone.parquet", Sample))
    tables.write_records(storage, "s.parquet", Sample, [])
    with pytest.raises(StorageError, match="no table of Question"):
        list(tables.read_records(storage, "s.parquet", Question))
    content = (tmp_path / "s.parquet").read_bytes()
    (tmp_path / "s.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match="damaged"):
        list(tables.read_records(storage, "s.parquet", Sample))
