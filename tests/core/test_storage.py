"""The storage root: whole writes, any file system, and clear words when it is full or closed."""

import errno
import os
import pickle
import re
import resource
import subprocess
import uuid
from pathlib import Path

import pytest

from rayva.errors import StorageError
from rayva.storage import Storage, translate_os_error


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    return Storage(f"memory://{uuid.uuid4()}")


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.check_writable()
    storage.write_bytes("a/b.bin", b"123")
    storage.write_json("a/c.json", {"x": [1, 2.5, None, "é"]})
    with storage.open("a/d.txt", "w") as file:
        file.write("text")
    assert storage.read_bytes("a/b.bin") == b"123"
    assert storage.read_json("a/c.json") == {"x": [1, 2.5, None, "é"]}
    assert storage.open("a/d.txt").read() == b"text"
    assert storage.list("a") == ["b.bin", "c.json", "d.txt"]
    assert storage.list("") == ["a"]
    assert storage.list("none") == []
    storage.delete("a")
    storage.delete("a")
    assert not storage.exists("a/b.bin")


def test_uris_are_understood_by_others(storage: Storage) -> None:
    import fsspec

    storage.write_bytes("a/b.bin", b"123")
    with fsspec.open(storage.uri("a", "b.bin"), "rb") as file:
        assert file.read() == b"123"


def test_folders_go_in_and_out(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below" / "x.bin").write_bytes(b"x")
    (source / "y.bin").write_bytes(b"y")
    for _ in range(2):  # the second time over what is there
        storage.upload(source, "in/here")
    local = storage.localize("in/here")
    assert (local / "below" / "x.bin").read_bytes() == b"x"
    assert (local / "y.bin").read_bytes() == b"y"
    assert storage.list("in/here") == ["below", "y.bin"]
    assert storage.localize("in/here/y.bin").read_bytes() == b"y"


def test_a_local_copy_is_gone_after_its_use(storage: Storage) -> None:
    storage.write_bytes("deep/x", b"x")
    with storage.local_copy("deep") as folder:
        assert (folder / "x").read_bytes() == b"x"
    assert folder.exists() == storage.is_local
    assert storage.read_bytes("deep/x") == b"x"


def test_a_local_path_is_used_where_it_is(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "x").write_bytes(b"x")
    assert storage.localize("x") == tmp_path / "x"
    storage.upload(tmp_path / "x", "x")
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_relative_root_becomes_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("run").root == str(tmp_path / "run")


def test_storage_travels_to_workers(storage: Storage) -> None:
    storage.write_bytes("x", b"x")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.root == storage.root
    assert copy.read_bytes("x") == b"x"


@pytest.mark.parametrize("rel", ["/etc/passwd", "../x", "a/../../x"])
def test_nothing_lies_outside_the_root(storage: Storage, rel: str) -> None:
    with pytest.raises(ValueError, match="not a path under the storage root"):
        storage.write_bytes(rel, b"")


def test_a_write_that_fails_leaves_the_old_file(small_disk: Path) -> None:
    storage = Storage(str(small_disk))
    storage.write_bytes("x", b"old")
    with pytest.raises(StorageError, match="No space is left"):
        storage.write_bytes("x", bytes(2 << 20))
    assert storage.read_bytes("x") == b"old"
    assert storage.list() == ["x"], "no remains of the failed write"


def test_a_stream_that_fills_the_disk_says_so(small_disk: Path) -> None:
    storage = Storage(str(small_disk))
    with storage.open("x", "wb") as file, pytest.raises(StorageError, match="No space is left") as caught:
        file.writelines(bytes(1 << 16) for _ in range(64))
    assert str(small_disk) in str(caught.value)
    assert "--storage" in str(caught.value)


def test_a_full_disk_is_told_before_the_work(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(900 << 10))
    with pytest.raises(StorageError, match="No space is left"):
        Storage(str(small_disk)).check_writable()


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StorageError, match="No space is left"):
            storage.write_bytes("x", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list() == []


def test_a_read_only_disk_is_told_before_the_work(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="cannot be written") as caught:
        Storage(str(small_disk / "run")).check_writable()
    assert str(small_disk / "run") in str(caught.value)


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="is a file, not a folder"):
            Storage(str(root)).check_writable()


def test_a_place_without_rights_is_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="cannot be written"):
        Storage(str(tmp_path / "closed" / "run")).check_writable()


def test_quota_and_rights_have_their_words() -> None:
    assert "No space" in str(translate_os_error(OSError(errno.EDQUOT, "x"), "/p"))
    assert "right to write" in str(translate_os_error(OSError(errno.EACCES, "x"), "/p"))


def test_an_unknown_kind_of_storage_is_told() -> None:
    with pytest.raises(StorageError, match="nosuch://x"):
        Storage("nosuch://x")


@pytest.mark.parametrize(
    ("root", "told"),
    [
        ("ftp://127.0.0.1:1/x", "refused"),
        ("zip://x.zip", "zip://x.zip"),
        ("zip://a::/nonexistent/x.zip", "/nonexistent/x.zip"),
        ("reference://x", "reference://x"),
        ("data:x", "Read only"),
        ("s3://", "names no place"),
        ("memory:///", "names no place"),
        ("file://", "names no place"),
        ("://x", "names no place"),
    ],
)
def test_places_that_cannot_be_used_are_told_in_words(
    root: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=re.escape(told)) as caught:
        Storage(root).check_writable()
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_constructor_that_cannot_connect_keeps_secrets_to_itself() -> None:
    with pytest.raises(StorageError, match=r"ftp://\*\*\*@127") as caught:
        Storage("ftp://me:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in str(caught.value)


def test_a_folder_may_have_two_colons_in_its_name(tmp_path: Path) -> None:
    storage = Storage(f"{tmp_path}/a::b")
    storage.check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["a::b"]


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StorageError, match=r"x\.json is damaged"):
        Storage(str(tmp_path)).read_json("x.json")


def test_an_empty_name_is_no_storage() -> None:
    with pytest.raises(StorageError, match="name is empty"):
        Storage("")


def test_a_uri_with_a_slash_too_few_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="neither a path nor a URI") as caught:
        Storage("s3:/bucket/run")
    assert "write s3://bucket/run," in caught.value.remedy
    Storage("./s3:/bucket/run").write_bytes("x", b"1")
    assert (tmp_path / "s3:" / "bucket" / "run" / "x").exists()
