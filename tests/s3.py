"""S3 for tests: moto's server on this machine, which can go away and come back, and places without any."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "bucket"
POLL = 0.01
"""Seconds in which a server notices that it is told to stop."""
_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
)


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str | None) -> dict[str, str]:
    """Uses `endpoint` with some credentials, or AWS itself without any; returns what is set for that."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    if endpoint is not None:
        settings |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": endpoint}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


class Server:
    """An S3 server in this process with the bucket `BUCKET`; what it holds outlives `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("moto")
        self._port = 0
        self.start()
        credentials(monkeypatch, f"http://127.0.0.1:{self._port}")
        import s3fs

        s3fs.S3FileSystem().mkdir(BUCKET)

    def start(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:
                pass

        application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self._port, application, threaded=True, request_handler=Quiet)
        self._port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(POLL,), daemon=True).start()

    def stop(self) -> None:
        """From here on nobody answers."""
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """Stops, and removes all that was stored."""
        from moto.backends import get_backend

        self.stop()
        get_backend("s3").reset()


class _Closed(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def closed_door() -> Iterator[str]:
    """The address of a server that lets nobody in."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Closed) as server:
        threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class DeadPort:
    """Context manager: the address of a port that nobody listens at."""

    def __enter__(self) -> str:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._socket.close()
