"""pipelines/generate.py against a real endpoint that bills: every sample once, nothing paid for twice."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.llm.running import Running, teacher
from tests.reference import CAPTIONS_AND_BOXES, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SAMPLES = 240
IN_FLIGHT = 8
FAULTS = ["retry_after", "server_error", "cut", "not_json", "garbage", "refusal", "slow"] * 3
CALL_DOLLARS = 150 / 1_000_000
"""The endpoint bills 100 + 50 tokens a call, at a dollar for a million."""


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """The 80 released contexts; 80 of our own where they are absent."""
    if CAPTIONS_AND_BOXES.exists():
        return CAPTIONS_AND_BOXES
    path = tmp_path / "contexts.jsonl"
    rows = [
        {
            "id": f"i{n}",
            "image": f"i{n}.jpg",
            "captions": [f"Dog number {n} runs over the grass.", "A pet outside."],
            "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}],
        }
        for n in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Job:
    """The pipeline's command line, with one storage and one endpoint."""

    def __init__(self, folder: Path, server: Running, contexts: Path) -> None:
        self.storage = folder / "storage"
        prices = folder / "prices.yaml"
        prices.write_text("paid: {prompt: 1.0, completion: 1.0}\n")
        self.command = [
            sys.executable, "pipelines/generate.py", "--storage", str(self.storage), "--input", str(contexts),
            "--teacher", "endpoint", "--base-url", server.base_url, "--model", "paid",
            "--prices", str(prices), "--concurrency", str(IN_FLIGHT), "--kinds", "1:1:1",
            "generation.timeout=1.5", "generation.max_tokens=64",
        ]  # fmt: skip

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *more: str, code: int = 0) -> str:
        with self.start(*more) as job:
            said = job.stdout.read() if job.stdout else ""
        assert job.returncode == code, said[-3000:]
        return said

    def output(self, name: str) -> Path:
        [found] = self.storage.glob(f"steps/generate-*/{name}")
        return found


def _check_samples(job: Job) -> list[dict[str, Any]]:
    """Every sample once, in LLaVA's form, with where it comes from."""
    rows: list[dict[str, Any]] = pq.read_table(job.output("samples.parquet")).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == SAMPLES
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(("conversation", "detail", "reasoning"), 80)
    assert all(row["model"] == "paid" and len(row["prompt_digest"]) == 64 for row in rows)
    samples = json.loads(job.output("samples.json").read_text(encoding="utf-8"))
    assert [s["id"] for s in samples] == [row["id"] for row in rows]
    return rows


def test_killed_in_the_middle_every_sample_comes_once(tmp_path: Path, contexts: Path) -> None:
    with teacher(tmp_path, latency=0.1, faults=FAULTS, every=6, slow=3.0) as server:
        job = Job(tmp_path, server, contexts)
        with job.start() as first:
            while server.calls < 100:
                assert first.poll() is None, first.stdout.read() if first.stdout else ""
                time.sleep(0.05)
            first.send_signal(signal.SIGKILL)
        assert first.returncode == -signal.SIGKILL
        assert "broke off and may be billed" in job.run()
        _check_samples(job)
        assert SAMPLES <= server.calls <= SAMPLES + len(FAULTS) + IN_FLIGHT
        rejects = pq.read_table(job.output("rejects.parquet")).to_pylist()
        assert all(row["reason"] and row["text"] for row in rejects)
        assert sum(row["text"] == "lorem ipsum" for row in rejects) <= FAULTS.count("garbage")
        assert {"refuses"} <= {row["reason"] for row in rejects}
        calls = server.calls
        assert "nothing to do" in job.run()
        assert server.calls == calls
    report = job.output("report.html").read_text(encoding="utf-8")
    assert "refuses" in report
    assert "http" not in report.replace("http://www.w3.org", "")


def test_max_cost_stops_in_good_order_and_goes_on_later(tmp_path: Path, contexts: Path) -> None:
    limit = 100 * CALL_DOLLARS
    with teacher(tmp_path, latency=0.02) as server:
        job = Job(tmp_path, server, contexts)
        assert "About $" in job.run("--dry-run", "--max-cost", "1")
        assert server.calls == 0
        job.run("--max-cost", f"{limit:.6f}", code=3)
        first = server.calls
        assert first > 0
        assert first * CALL_DOLLARS <= limit
        kept = pq.read_table(job.output("samples.parquet")).num_rows
        assert kept == first
        job.run("--max-cost", f"{limit:.6f}", code=3)
        assert server.calls == first
        job.run("--max-cost", "1")
        _check_samples(job)
        assert server.calls == SAMPLES
