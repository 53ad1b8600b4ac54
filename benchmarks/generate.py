"""How busy instruction generation keeps a teacher: the share of its slots that are answering.

The teacher is an HTTP server in a process of its own, with a number of slots and a time for each answer. The
share counts from its first call to its last answer, so the start of Ray is left out and the end, when the
slots run dry, is not.

    python benchmarks/generate.py
    python benchmarks/generate.py --slots 64 --latency 0.2 --images 2000 --storage /tmp/generate
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = _options()
    if options.serve:
        asyncio.run(_Teacher(options.slots, options.latency).serve())
        return
    storage = options.storage or Path(tempfile.mkdtemp(prefix="rayva-generate-"))
    storage.mkdir(parents=True, exist_ok=True)
    contexts = storage / "contexts.jsonl"
    contexts.write_text("".join(json.dumps(_context(n)) + "\n" for n in range(options.images)))
    serve = [sys.executable, __file__, "--serve", "--slots", str(options.slots), "--latency"]
    server = subprocess.Popen([*serve, str(options.latency)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        _generate(storage, contexts, port, options.concurrency or options.slots)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as answer:
            stats: dict[str, float] = json.loads(answer.read())
    finally:
        server.kill()
        server.wait()
    share = stats["busy"] / (options.slots * stats["seconds"])
    load = os.getloadavg()[0]
    print("\n| slots | latency, s | calls | calls/s | busy | load average |\n|---|---|---|---|---|---|")
    print(
        f"| {options.slots} | {options.latency:g} | {stats['calls']:,.0f} | "
        f"{stats['calls'] / stats['seconds']:.0f} | {share:.1%} | {load:.1f} |"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=64, help="calls that the teacher answers at once")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that an answer takes")
    parser.add_argument("--images", type=int, default=2000, help="contexts; three samples each")
    parser.add_argument("--concurrency", type=int, help="calls in flight (default: the teacher's slots)")
    parser.add_argument("--storage", type=Path, help="folder for the run (default: a new temporary one)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _context(number: int) -> dict[str, Any]:
    """About as much text as COCO has for an image: five captions and seven boxes."""
    captions = [
        f"Scene {number} shows a dog that runs over the grass towards a ball, view {n}." for n in range(5)
    ]
    boxes = [{"category": "dog", "bbox": [n / 10, 0.2, n / 10 + 0.1, 0.5]} for n in range(7)]
    return {"id": f"{number:06d}", "image": f"{number:06d}.jpg", "captions": captions, "instances": boxes}


def _generate(storage: Path, contexts: Path, port: int, concurrency: int) -> None:
    command = [
        sys.executable, str(ROOT / "pipelines" / "generate.py"), "--storage", str(storage),
        "--input", str(contexts), "--teacher", "endpoint", "--base-url", f"http://127.0.0.1:{port}/v1",
        "--model", "rayva", "--kinds", "1,1,1", "--concurrency", str(concurrency),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)


class _Teacher:
    """Answers in the format of the examples it is shown, never twice the same."""

    def __init__(self, slots: int, latency: float) -> None:
        self._slots, self._latency = asyncio.Semaphore(slots), latency
        self._calls, self._busy, self._first, self._last = 0, 0.0, 0.0, 0.0

    async def serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/stats", self._stats)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._calls += 1
        number = self._calls
        self._first = self._first or time.monotonic()
        async with self._slots:
            await asyncio.sleep(self._latency)
            # What the answer should take: oversleeping on a loaded machine is no work of the teacher's.
            self._busy += self._latency
        self._last = time.monotonic()
        message = {"role": "assistant", "content": _answer(body, number)}
        usage = {"prompt_tokens": 900, "completion_tokens": 120}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return web.json_response({"model": body["model"], "choices": choices, "usage": usage})

    async def _stats(self, _: web.Request) -> web.Response:
        seconds = self._last - self._first
        return web.json_response({"calls": self._calls, "busy": self._busy, "seconds": seconds})


def _answer(body: dict[str, Any], number: int) -> str:
    text = f"This is view {number} of a dog that runs over the grass. " + "It looks lively and glad. " * 2
    example = body["messages"][2]["content"]
    if "Question:" not in example:
        return text
    turns = 3 if example.count("Question:") > 1 else 1
    return "\n===\n".join(
        f"Question:\nWhat would change if view {n} of {number} came first?\n===\nAnswer:\n{text}"
        for n in range(turns)
    )


if __name__ == "__main__":
    main()
