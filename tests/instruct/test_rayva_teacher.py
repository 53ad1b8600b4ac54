"""A Rayva endpoint as the teacher: its own HTTP interface with keys, and the whole service on Ray."""

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayva.instruct.contexts import Context
from rayva.instruct.generator import Generator, Outcome
from rayva.instruct.prompts import FOLDERS, PromptSet
from rayva.instruct.tasks import KINDS, Task
from rayva.instruct.teachers import EndpointTeacher, Requests
from rayva.llm.client import ChatClient, Endpoint
from rayva.llm.request import PermanentError
from rayva.recipes.schema import Generation, Serving
from rayva.serving.api import ApiSettings
from rayva.serving.engine import Piece
from rayva.serving.keys import key_digests
from rayva.serving.schema import Sampling
from rayva.text.conversation import Message
from tests.export.tiny_model import make_model_folder
from tests.llm.teacher import in_format
from tests.serving.conftest import HttpServer

ROOT = Path(__file__).resolve().parents[2]
KEY = "rayva-secret-1234"


class ScriptedEngine:
    """Answers in the format that the conversation's examples show: a model that has learned it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Sampling]] = []

    async def generate(
        self, messages: Sequence[Message], images: Sequence[Image.Image], sampling: Sampling
    ) -> AsyncIterator[Piece]:
        self.seen.append((len(messages), sampling))
        body = {"messages": [{"role": m.role, "content": m.text} for m in messages]}
        yield Piece(in_format(body, len(self.seen)))
        yield Piece("", "stop", 123, 45)

    async def ready(self) -> bool:
        return True


def test_its_answers_become_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    engine = ScriptedEngine()
    limits = Serving(max_new_tokens=256)
    keys = key_digests({"RAYVA_API_KEYS": f"other,{KEY}"})
    contexts = [Context(str(n), f"{n}.jpg", (f"Dog number {n} runs.",)) for n in range(4)]
    tasks = [Task(kind, 0, context) for kind in KINDS for context in contexts]

    async def run(url: str, model: str, key: str = "TEACHER_KEY") -> list[Outcome]:
        settings = Generation(teacher="endpoint", model=model, max_tokens=200, temperature=0.5, seed=7)
        async with ChatClient(Endpoint(f"{url}/v1", key)) as client:
            teacher = EndpointTeacher(client, Requests(settings, PromptSet.load()))
            generator = Generator(teacher, attempts=1, seed=0)
            return [await generator.generate(task) for task in tasks]

    with HttpServer(engine, ApiSettings("mine", limits, keys)) as url:
        outcomes = asyncio.run(run(url, "mine"))
        assert Counter(outcome.status for outcome in outcomes) == {"accepted": len(tasks)}
        answers = [attempt.answer for outcome in outcomes for attempt in outcome.attempts]
        assert {(a.model, a.prompt_tokens, a.completion_tokens) for a in answers} == {("mine", 123, 45)}
        assert {(s.max_new_tokens, s.temperature, s.seed) for _, s in engine.seen} == {(200, 0.5, 7)}
        assert all(length > 4 for length, _ in engine.seen), "the examples are part of the conversation"
        for model, key in (("another", "TEACHER_KEY"), ("mine", "NO_SUCH_VARIABLE")):
            with pytest.raises(PermanentError) as caught:
                asyncio.run(run(url, model, key))
            assert caught.value.fatal
            assert KEY not in str(caught.value)


@pytest.fixture
def short_prompts(tmp_path: Path) -> Path:
    """In the original's layout, and short enough for a model with a small context."""
    for name in FOLDERS.values():
        folder = tmp_path / "prompts" / name
        folder.mkdir(parents=True)
        (folder / "system_message.txt").write_text("Ask and answer.")
        (folder / "000_caps.txt").write_text("A dog.")
        (folder / "000_conv.txt").write_text("Question:\nWhat?\n===\nAnswer:\nA dog.")
    return tmp_path / "prompts"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    """pipelines/serve.py with a model of random weights, behind a key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = make_model_folder(tmp_path / "model")
    command = [
        sys.executable, "pipelines/serve.py", "--model", str(model), "--name", "mine",
        f"serving.port={port}", "serving.max_new_tokens=24",
    ]  # fmt: skip
    environment = os.environ | {"RAYVA_API_KEYS": KEY, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in job.stdout or ()], daemon=True)
        reader.start()
        try:
            while "Serving at" not in (line := lines.get(timeout=180)):
                pass
            yield line.split()[2]
        finally:
            job.send_signal(signal.SIGTERM)
            try:
                job.wait(timeout=60)
            except subprocess.TimeoutExpired:
                job.kill()  # else leaving the block would wait for ever
                raise


@pytest.mark.slow
@pytest.mark.ray
def test_the_whole_service_is_asked_with_its_key(tmp_path: Path, service: str, short_prompts: Path) -> None:
    storage, contexts = tmp_path / "storage", tmp_path / "contexts.jsonl"
    rows = [{"image": f"{n}.jpg", "captions": [f"Dog number {n} runs."]} for n in range(3)]
    contexts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def generate(key: str, code: int, *more: str) -> str:
        command = [
            sys.executable, "pipelines/generate.py", "--storage", str(storage), "--kinds", "1:1:1",
            "--input", str(contexts), "--teacher", "endpoint", "--base-url", service, "--model", "mine",
            "--prompts", str(short_prompts), "generation.api_key_env=TEACHER_KEY", "generation.attempts=2",
            "generation.max_tokens=24", *more,
        ]  # fmt: skip
        job = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"TEACHER_KEY": key}, capture_output=True, text=True
        )
        assert job.returncode == code, job.stdout + job.stderr[-3000:]
        return job.stdout + job.stderr

    assert "refuses every call" in generate("wrong-key-5678", 2)
    said = generate(KEY, 0)
    assert "0 of 9 samples" in said
    [table] = storage.glob("steps/generate-*/rejects.parquet")
    rejects = pq.read_table(table).to_pylist()
    # Random weights keep no format: everything was asked twice, and has its reason.
    assert Counter(row["attempt"] for row in rejects) == {0: 9, 1: 9}
    assert all(row["reason"] and row["model"] == "mine" for row in rejects)
    assert all(0 < row["completion_tokens"] <= 24 and row["prompt_tokens"] > 20 for row in rejects)
    kept = [path.read_bytes() for path in storage.rglob("*") if path.is_file()]
    for secret in (KEY, "wrong-key-5678"):
        assert secret not in said
        assert not any(secret.encode() in content for content in kept)
