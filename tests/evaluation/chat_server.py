"""A chat endpoint for tests: a real HTTP server that answers, is slow, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[int, dict[str, Any]], "str | tuple[int, dict[str, str], str] | bytes"]
"""From the call's number and the request's body to an answer, (status, headers, body), or a cut body."""


class ChatServer:
    """Context manager; `calls` holds the body of every request that came in."""

    def __init__(self, behave: Behaviour, delay: float = 0.0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.calls.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.calls)
                time.sleep(delay)
                answer = behave(number, body)
                if isinstance(answer, bytes):
                    self._send(200, {"Content-Length": str(len(answer) + 100)}, answer)
                elif isinstance(answer, tuple):
                    self._send(answer[0], answer[1], answer[2].encode())
                else:
                    self._send(200, {}, completion(answer).encode())

            def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                """Is silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str) -> str:
    """A whole answer in the API's form."""
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return json.dumps({"model": "served-model-0613", "choices": [message], "usage": usage})


def question_of(body: dict[str, Any]) -> str:
    """The text of the last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")
