"""Opens a page in headless Chromium and tells what became of it, over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
_SECONDS = 60


@dataclass(frozen=True)
class Seen:
    """What the browser told: messages of its console and its log, and the values of the expressions."""

    messages: list[str]
    values: list[Any]
    screenshot: bytes


def look(page: Path, *expressions: str, size: tuple[int, int] = (1100, 1400), dark: bool = False) -> Seen:
    """Loads a file, evaluates JavaScript expressions in it, and takes a picture of the whole page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
            "--no-first-run", "--disable-background-networking", "--hide-scrollbars", "about:blank",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                port = _port(Path(profile) / "DevToolsActivePort", browser)
                return asyncio.run(_look(port, page, expressions, size, dark))
            finally:
                browser.terminate()
                browser.wait(timeout=30)


def _port(file: Path, browser: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and browser.poll() is None:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise RuntimeError("Chromium did not start")


async def _look(
    port: int, page: Path, expressions: tuple[str, ...], size: tuple[int, int], dark: bool
) -> Seen:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SECONDS)) as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            [target] = [t for t in await answer.json() if t["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Runtime", "Log", "Page"):
                await tab.call(f"{domain}.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", features=[scheme])
            metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
            await tab.call("Emulation.setDeviceMetricsOverride", **metrics)
            await tab.call("Page.navigate", url=page.absolute().as_uri())
            await tab.until("Page.loadEventFired")
            await tab.value("new Promise(done => setTimeout(done, 200))")
            values = [await tab.value(expression) for expression in expressions]
            height = int(await tab.value("document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": size[0], "height": min(height, 6000), "scale": 1}
            shot = await tab.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            return Seen(tab.messages, values, base64.b64decode(shot["data"]))


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._events: list[str] = []
        self.messages: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._next()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result

    async def until(self, event: str) -> None:
        while event not in self._events:
            await self._next()

    async def value(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return answer["result"].get("value")

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((await self._socket.receive()).data)
        method = message.get("method", "")
        self._events.append(method)
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(message["params"]))
        return message
