"""MLflow's SQLite file is made whole: killed while its tables are made, nothing half-made is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayva.tracking.server import make_client
from rayva.tracking.sqlite import ensure_tables, sqlite_file

PLATFORM = Path(__file__).resolve().parents[2] / "platform"
MAKE = "import sys; from rayva.tracking.sqlite import ensure_tables; ensure_tables(sys.argv[1])"


def _start(uri: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM), "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen([sys.executable, "-c", MAKE, uri], env=environment, stderr=subprocess.DEVNULL)


def _kill_when_it_holds(folder: Path, uri: str, size: int) -> None:
    """Kills a process that makes the tables when its unfinished file has `size` bytes."""
    process = _start(uri)
    own = folder / f".mlflow.db.{process.pid}.new"
    deadline = time.monotonic() + 120
    while not own.exists() or own.stat().st_size < size:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_while_the_tables_are_made_the_next_start_makes_them(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for size in (1, 200_000):
        _kill_when_it_holds(tmp_path, uri, size)
        assert not (tmp_path / "mlflow.db").exists()
    assert [path.name for path in tmp_path.glob(".mlflow.db.*.new")], "the kill came too late to prove it"

    client = make_client(uri)
    assert client.get_experiment(client.create_experiment("e")).name == "e"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.slow
def test_of_two_processes_one_file_wins_and_both_end_well(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = [_start(uri) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert make_client(uri).get_experiment_by_name("Default") is not None


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"somebody's")
    ensure_tables(f"sqlite:///{file}")
    assert file.read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////data/mlflow.db", Path("/data/mlflow.db")),
        ("sqlite+pysqlite:////data/mlflow.db", Path("/data/mlflow.db")),
        ("sqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite://", None),
        ("postgresql://host/db", None),
        ("http://host:5000", None),
    ],
)
def test_which_uris_have_a_file(uri: str, file: Path | None) -> None:
    assert sqlite_file(uri) == file
