"""A tiny random model behind the real HTTP interface, without Ray."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from rayva.model.folder import Assistant, load_assistant
from rayva.recipes.schema import Serving
from rayva.serving.api import ApiSettings, build_api
from rayva.serving.engine import BuiltinEngine, Engine
from tests.export.tiny_model import make_model_folder

LIMITS = Serving(max_new_tokens=32, max_images=2, max_image_bytes=50_000)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("served"), projector="mlp2x_gelu")


@pytest.fixture(scope="session")
def assistant(model_folder: Path) -> Assistant:
    return load_assistant(model_folder)


class HttpServer:
    """Runs an application on an ephemeral port, in a thread."""

    def __init__(self, engine: Engine, settings: ApiSettings) -> None:
        config = uvicorn.Config(build_api(engine, settings), port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)


@pytest.fixture(scope="session")
def url(assistant: Assistant) -> Iterator[str]:
    engine = BuiltinEngine(assistant)
    with HttpServer(engine, ApiSettings("tiny", LIMITS)) as address:
        yield address
    engine.close()


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of random pixels, as a file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(text: str, *urls: str) -> list[dict[str, object]]:
    """A conversation of one user message with pictures and a text."""
    parts = [*(image_part(url) for url in urls), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]
