"""The incremental JSON reader agrees with the standard one, and says where a file is broken."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data import json_rows
from rayva.data.json_rows import read_json_rows
from rayva.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def rows_of(path):
    return [row.value for row in read_json_rows(str(path), "data.json")]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_arrays_read_as_json_loads_reads_them(chunk, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    path = tmp_path_factory.mktemp("json") / "rows.json"

    @settings(deadline=None, max_examples=30)
    @given(st.lists(values, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans())
    def agrees(rows, indent, ascii_only):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            with pytest.raises(DataError, match="UTF-8"):
                rows_of(path)
        else:
            assert rows_of(path) == rows

    agrees()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_syntax_error_is_placed_where_the_standard_reader_places_it(chunk, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    path = tmp_path_factory.mktemp("json") / "rows.json"

    @settings(deadline=None, max_examples=30)
    @given(st.lists(values, min_size=1, max_size=3), st.integers(0, 200), st.sampled_from('}]x,:"'))
    def placed(rows, at, noise):
        text = json.dumps(rows, indent=1)
        text = text[: at % len(text)] + noise + text[at % len(text) :]
        path.write_text(text)
        expected, line = None, None
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            line = error.lineno
        if line is None:
            assert rows_of(path) == expected
            return
        with pytest.raises(DataError) as caught:
            rows_of(path)
        if text.startswith("["):
            assert f"line {line}, column" in str(caught.value)

    placed()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson"])
def test_json_lines(name, tmp_path):
    path = tmp_path / name
    path.write_text('\n{"a": 1}\n\n{"a": 2}\nnot json\n[3]\n')
    rows = list(read_json_rows(str(path), "data.json"))
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}, None, [3]]
    assert [bool(row.error) for row in rows] == [False, False, True, False]
    assert "line 5, column 1" in rows[2].error


def test_long_first_lines_and_chunk_borders_in_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", 5)
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "x" * n} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(path) == rows


def test_gzip_and_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf[{"a": 1}]'))
    assert rows_of(path) == [{"a": 1}]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="to its end"):
        rows_of(path)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "line 1, column 1"),
        (b"<html>\n</html>", "line 1, column 1"),
        (b"[1, 2", "line 1, column 6"),
        (b"[1,\n 2\n 3]", "line 3, column 2"),
        (b'[{"a": 1},\n {"a": }]', "line 2, column 8"),
        (b"[1]\n[2]", "line 2, column 1"),
        (b"{\n  'a': 1}", "line 1, column 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1" + b"0" * 5000 + b"]", "line 1, column 2"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_what_is_no_json_is_one_clear_error(content, place, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)
    assert place in str(caught.value)
    assert caught.value.remedy


def test_a_missing_file_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"data\.finetune_json = .*gone\.json.*does not exist"):
        list(read_json_rows(str(tmp_path / "gone.json"), "data.finetune_json"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_json_rows(str(tmp_path), "data.finetune_json"))
