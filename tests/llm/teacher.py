"""An OpenAI-compatible endpoint for tests: a real HTTP server in a process of its own that can misbehave.

Started as a script: `teacher.py PLAN.json`. The plan says what the server does:

    latency     seconds that each answer takes
    concurrent  calls that are answered at once; more of them wait
    faults      list of faults, each given once, to the calls in the order in which they arrive
                (`every` calls apart): retry_after, server_error, slow, cut, not_json, garbage, refusal
    answers     {kind: text}: what is answered to a prompt whose system message names the kind
    key         the key that is asked for, if any
    limit_name  the setting's name for the longest answer; another one is refused
    forbidden   setting that is refused
    pause       seconds that `Retry-After` asks for
    window      [calls, seconds]: more calls in each such time are refused with a `Retry-After` of that time
    by_message  answers are told apart by the last message, and not by the call
    refuse      [status, body]: what every call is answered with

Prints its port. GET /stats gives {"calls", "busy", "seconds", "early"}: busy adds up the seconds of all
answers, early counts the calls that came before the time that `Retry-After` had named.
"""

import asyncio
import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from aiohttp import web


class Teacher:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.calls = 0
        self.faults = list(plan.get("faults", []))
        self.slots = asyncio.Semaphore(plan.get("concurrent", 1000))
        self.busy = 0.0
        self.first = self.last = 0.0
        self.early, self.closed_until = 0, 0.0
        self.window_ends, self.in_window = 0.0, 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        self.early += time.monotonic() < self.closed_until
        number = self.calls
        fault = None
        if self.faults and number % self.plan.get("every", 1) == 0:
            fault = self.faults.pop(0)
        if (key := self.plan.get("key")) and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        if refuse := self.plan.get("refuse"):
            return web.json_response(refuse[1], status=refuse[0])
        if (window := self.plan.get("window")) and self.passes(*window):
            return web.json_response(
                {"error": "too many"}, status=429, headers={"Retry-After": str(window[1])}
            )
        body = await request.json()
        wanted = self.plan.get("limit_name", "max_tokens")
        if wanted not in body:
            told = f"Unsupported parameter: 'max_tokens'. Use '{wanted}' instead."
            return web.json_response({"error": {"message": told, "param": "max_tokens"}}, status=400)
        if (forbidden := self.plan.get("forbidden")) in body:
            detail = [{"type": "extra_forbidden", "loc": ["body", forbidden], "msg": "not permitted"}]
            return web.json_response({"detail": detail}, status=422)
        async with self.slots:
            started = time.monotonic()
            self.first = self.first or started
            await asyncio.sleep(self.plan.get("latency", 0.0))
            self.last = time.monotonic()
            self.busy += self.last - started
        return await self.respond(request, body, fault, number)

    def passes(self, calls: int, seconds: float) -> bool:
        """Whether another call passes the limit on calls in a time."""
        now = time.monotonic()
        if now >= self.window_ends:
            self.window_ends, self.in_window = now + seconds, 0
        self.in_window += 1
        return self.in_window > calls

    async def respond(
        self, request: web.Request, body: dict[str, Any], fault: str | None, number: int
    ) -> web.StreamResponse:
        if fault == "retry_after":
            pause = self.plan.get("pause", 0.3)
            self.closed_until = time.monotonic() + pause
            return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": str(pause)})
        if fault == "server_error":
            return web.Response(status=500, text="oops")
        if fault == "slow":
            await asyncio.sleep(self.plan.get("slow", 3.0))
        if fault == "not_json":
            return web.Response(text="<html>hello</html>", content_type="application/json")
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": "5000"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            assert request.transport is not None
            request.transport.close()
            return response
        if self.plan.get("by_message"):
            number = zlib.crc32(body["messages"][-1]["content"].encode())
        text = in_format(body, number)
        if fault == "garbage":
            text = "lorem ipsum"
        if fault == "refusal":
            text = "I'm sorry, but I cannot help with that request."
        usage = {"prompt_tokens": self.plan.get("prompt_tokens", 100), "completion_tokens": 50}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return web.json_response({"model": body["model"], "choices": [choice], "usage": usage})

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "calls": self.calls,
                "busy": self.busy,
                "seconds": self.last - self.first,
                "early": self.early,
            }
        )


def in_format(body: dict[str, Any], number: int) -> str:
    """An answer in the format that the prompt's examples show; `number` tells answers apart."""
    question = body["messages"][-1]["content"]
    subject = question.splitlines()[0] if isinstance(question, str) else "it"
    examples = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    if not examples:
        return f"echo {subject}"
    if examples[0].count("Question:") > 1:
        return (
            f"Question:\nWhat can be seen in scene {number}?\n===\nAnswer:\n{subject}\n===\n"
            f"Question:\nWhat else is going on there?\n===\nAnswer:\nIt is a calm place, {number}."
        )
    if "Question:" in examples[0]:
        return (
            f"Question:\nWhy could the moment {number} matter to somebody?\n===\nAnswer:\n"
            f"Someone may remember it for a long while, since {subject} That says a lot about day {number}."
        )
    return f"The picture, number {number}, is a scene of its own. {subject} The light is soft and even."


async def main() -> None:
    teacher = Teacher(json.loads(Path(sys.argv[1]).read_text()))
    app = web.Application()
    app.router.add_post("/v1/chat/completions", teacher.complete)
    app.router.add_get("/stats", teacher.stats)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
