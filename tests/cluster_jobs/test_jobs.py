"""`ray job submit` with and without --working-dir, on a cluster of two nodes with token authentication.

The nodes have the packages but not Rayva. The checkout that is submitted is a copy with a marker in it,
so that it is seen whose code runs.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.small import SMALL_TINY

ROOT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("RAY_", "PYTHON")) and not name.lower().endswith("_proxy")
}

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@dataclass
class Cluster:
    """Two nodes; `call` runs a command as one who has the token."""

    environment: dict[str, str]
    gcs: str
    port: int
    home: Path

    def call(self, *command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **more}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def submit(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        address = f"http://127.0.0.1:{self.port}"
        return self.call(*RAY, "job", "submit", "--address", address, *arguments, cwd=cwd)


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Short: a socket's path has room for 107 characters.
    home = Path("/tmp") / f"rayva-{os.getpid()}"
    home.mkdir()
    token = home / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    gcs, dashboard, client, *agents = free_ports(5)
    environment = {
        **CLEAN,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
    }
    common = [*RAY, "start", "--block", "--num-cpus=2", "--object-store-memory=100000000"]
    head = [
        *common, "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={home}",
        f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={agents[0]}",
    ]  # fmt: skip
    # Both have one address, as on a machine without a network, but each has a folder of its own for what it
    # fetches: a node that fetches a package first removes the folder of that name.
    worker = [
        *common, f"--address=127.0.0.1:{gcs}", "--node-ip-address=127.0.0.1", f"--temp-dir={home / '2'}",
        f"--dashboard-agent-listen-port={agents[1]}",
    ]  # fmt: skip
    if os.geteuid() == 0:
        # The second node sees another folder in this one's place.
        (home / "unshared").mkdir()
        hide = 'mount -t tmpfs none "$0" && exec "$@"'
        worker = ["unshare", "--mount", "sh", "-c", hide, str(home / "unshared"), *worker]
    nodes = []
    try:
        for command in (head, worker):
            log = (home / f"{len(nodes)}.log").open("w")
            nodes.append(
                subprocess.Popen(
                    command,
                    cwd=home,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
            if command is head:
                wait_until_ready(environment, gcs, dashboard, 1, home)
        wait_until_ready(environment, gcs, dashboard, 2, home)
        yield Cluster(environment, f"127.0.0.1:{gcs}", dashboard, home)
    finally:
        # The group is the node; asked to end, `ray start --block` would take half a minute.
        for node in reversed(nodes):
            os.killpg(node.pid, signal.SIGKILL)
        for node in nodes:
            node.wait(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


READY = """
import sys, time, ray
from ray.job_submission import JobSubmissionClient
gcs, dashboard, count = sys.argv[1:]
end = time.monotonic() + 120
while True:
    try:
        ray.init(gcs, log_to_driver=False)
        break
    except ConnectionError:
        assert time.monotonic() < end, "no cluster"
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) < int(count):
    assert time.monotonic() < end, "a node is missing"
    time.sleep(0.2)
while True:
    try:
        JobSubmissionClient(dashboard).submit_job(entrypoint="true")
        break
    except (RuntimeError, ConnectionError) as error:  # the job agent comes up after the node
        assert time.monotonic() < end, error
        time.sleep(0.5)
"""


def wait_until_ready(environment: dict[str, str], gcs: int, dashboard: int, nodes: int, home: Path) -> None:
    command = [sys.executable, "-c", READY, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", str(nodes)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's look-alike: the code, a marker, and git's log of HEAD behind the link."""
    root = tmp_path_factory.mktemp("checkout") / "repository"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("platform", "pipelines", "cluster", "tests/cluster_jobs"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", root)
    (root / "platform" / "rayva" / "marker.txt").write_text("submitted")
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *command], cwd=root, check=True)
    return root


def commit_of(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"RESULT (\{.*\})", done.stdout)
    assert found is not None, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(found[1])
    return result


def check(result: dict[str, Any], checkout: Path) -> None:
    assert result["code"]["commit"] == commit_of(checkout)
    assert len(result["nodes"]) == 2
    assert {answer["node"] for answer in result["answers"]} == set(result["nodes"])
    for answer in result["answers"]:
        assert answer["marker"] == "submitted"
        assert Path(answer["platform"]).parent == Path(sysconfig.get_path("stdlib"))
        # Not the checkout itself, which other machines would not have, but the job's own copy.
        assert Path(answer["rayva"]).is_relative_to(answer["cwd"])
        assert "working_dir_files" in answer["rayva"]


def test_with_a_working_dir(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    done = cluster.submit(
        "--working-dir", ".", "--", "python", "tests/cluster_jobs/driver.py", str(tmp_path), cwd=checkout
    )
    check(result_of(done), checkout)


def test_without_a_working_dir(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    driver = checkout / "tests" / "cluster_jobs" / "driver.py"
    done = cluster.submit("--", "python", str(driver), str(tmp_path), cwd=tmp_path)
    check(result_of(done), checkout)


def test_a_driver_that_joins_by_address(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    """No job at all: somebody on the head node starts the script with RAY_ADDRESS set."""
    done = cluster.call(
        sys.executable, "tests/cluster_jobs/driver.py", str(tmp_path), cwd=checkout,
        RAY_ADDRESS=cluster.gcs,
    )  # fmt: skip
    check(result_of(done), checkout)


TWO_WORKERS = [
    *SMALL_TINY, "pretrain.micro_batch_size=4", "finetune.batch_size=8", "finetune.micro_batch_size=4",
    "scaling.workers=2", "scaling.cpus_per_worker=1",
]  # fmt: skip


def test_the_whole_job_in_both_forms(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    """Trained by two workers; the second job has other settings, and shares what they do not change."""
    storage = tmp_path / "run"
    script, with_storage = "pipelines/full.py", ["--recipe", "tiny", "--storage", str(storage), *TWO_WORKERS]
    done = cluster.submit("--working-dir", ".", "--", "python", script, *with_storage, cwd=checkout)
    first = whole_run(done, storage, checkout)
    without = ["python", str(checkout / script), *with_storage, "finetune.lr=5e-4"]
    second = whole_run(cluster.submit("--", *without, cwd=tmp_path), storage, checkout)
    same = {n for n, stage in second["stages"].items() if stage["folder"] == first["stages"][n]["folder"]}
    assert same == {"weights", "data", "features", "pretrain"}


def whole_run(done: subprocess.CompletedProcess[str], storage: Path, checkout: Path) -> dict[str, Any]:
    """The summary of a job that ended well; its code and its workers are checked."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    summary: dict[str, Any] = json.loads((storage / "summary.json").read_text(encoding="utf-8"))
    assert summary["commit"] == commit_of(checkout)
    assert summary["mlflow"]["run_id"]
    for stage in ("pretrain", "finetune"):
        manifest = json.loads((Path(summary["stages"][stage]["folder"]) / "manifest.json").read_text())
        assert manifest["outputs"]["workers"] == 2
    return summary


def test_more_workers_than_the_cluster_has_is_told_before_any_work(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    done = cluster.submit(
        "--working-dir", ".", "--", "python", "pipelines/full.py", "--storage", str(tmp_path / "run"),
        "scaling.workers=5", "scaling.cpus_per_worker=1", cwd=checkout,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "asks for 5 CPUs (5 training workers, 1 each), but the cluster has 4" in said
    assert "set scaling.workers=4" in said
    assert "Traceback (most recent call last)" not in said


def test_a_storage_that_a_node_cannot_see_is_told(cluster: Cluster, checkout: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding a folder from a node needs root")
    root = cluster.home / "unshared" / "run"
    done = cluster.submit(
        "--working-dir", ".", "--", "python", "pipelines/full.py", "--storage", str(root), cwd=checkout
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"cannot see the storage {root}" in said
    assert "a folder that all nodes share" in said
    assert not list(root.glob(".seen*"))


def test_images_that_a_node_cannot_see_are_told(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding a folder from a node needs root")
    images = cluster.home / "unshared" / "images"
    images.mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    done = cluster.submit(
        "--working-dir", ".", "--", "python", "pipelines/full.py", "--storage", str(tmp_path / "run"),
        "data.source=llava", f"data.pretrain_json={rows}", f"data.finetune_json={rows}",
        f"data.finetune_images={images}", cwd=checkout,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"cannot see data.finetune_images = {images}, which is on the disk of the node" in said
    assert "Traceback (most recent call last)" not in said


def test_rows_without_images_may_lie_where_only_the_script_sees_them(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding a folder from a node needs root")
    rows = cluster.home / "unshared" / "text.json"
    turns = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "Yes."}]
    rows.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(9)]))
    done = cluster.submit(
        "--working-dir", ".", "--", "python", "pipelines/full.py", "--storage", str(tmp_path / "run"),
        "--until", "data", "data.source=llava", f"data.pretrain_json={rows}", f"data.finetune_json={rows}",
        *(setting for setting in SMALL_TINY if setting.startswith("weights.")), cwd=checkout,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "data: done" in said
