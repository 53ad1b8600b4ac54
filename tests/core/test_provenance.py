"""The commit and the ids of the running files are git's own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rayva.provenance import HEAD_LOG, REPOSITORY, SOURCE_ROOT, commit_from_head_log, tree_id

GIT = ["git", "-c", "user.name=a b", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "checkout"
    (root / "platform" / "pkg" / "a").mkdir(parents=True)
    (root / "platform" / "pkg" / "a.py").write_text("a\n")  # a file and a folder that git sorts its own way
    (root / "platform" / "pkg" / "a" / "x.py").write_text("x\n")
    (root / "platform" / "pkg" / "a-b").write_text("")
    (root / "cluster").mkdir()
    os.symlink("../.git/logs/HEAD", root / HEAD_LOG)
    git(root, "init", "-q", "-b", "main")
    commit(root, "first")
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run([*GIT, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path, message: str) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def test_the_tree_id_is_gits(checkout: Path) -> None:
    cache = checkout / "platform" / "pkg" / "__pycache__"
    cache.mkdir()
    (cache / "a.cpython-311.pyc").write_bytes(b"x")
    (checkout / "platform" / "empty").mkdir()
    assert tree_id(checkout / "platform") == git(checkout, "rev-parse", "HEAD:platform")
    (checkout / "platform" / "pkg" / "a.py").write_text("b\n")
    assert tree_id(checkout / "platform") != git(checkout, "rev-parse", "HEAD:platform")


def test_the_head_log_tells_the_commit(checkout: Path, tmp_path: Path) -> None:
    log = checkout / HEAD_LOG
    assert commit_from_head_log(log) == git(checkout, "rev-parse", "HEAD")
    second = commit(checkout, "second: with\ttab")
    assert commit_from_head_log(log) == second
    git(checkout, "checkout", "-q", "HEAD~1")
    assert commit_from_head_log(log) == git(checkout, "rev-parse", "HEAD") != second
    git(checkout, "clone", "-q", str(checkout), str(tmp_path / "clone"))
    assert commit_from_head_log(tmp_path / "clone" / HEAD_LOG) == git(tmp_path / "clone", "rev-parse", "HEAD")


def test_without_a_log_there_is_no_commit(tmp_path: Path) -> None:
    assert commit_from_head_log(tmp_path / "none") is None
    (tmp_path / "log").write_text("")
    assert commit_from_head_log(tmp_path / "log") is None
    (tmp_path / "log").write_text("something else\n")
    assert commit_from_head_log(tmp_path / "log") is None


def test_the_link_is_in_this_repository() -> None:
    assert os.readlink(REPOSITORY / HEAD_LOG) == "../.git/logs/HEAD"


def test_no_source_file_is_executable() -> None:
    """The id of the files would differ from git's: unpacking an upload loses that bit."""
    assert [
        path for path in SOURCE_ROOT.rglob("*.py") if os.access(path, os.X_OK) and path.stat().st_mode & 0o111
    ] == []
