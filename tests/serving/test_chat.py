"""`rayva chat`, against an endpoint and against a folder."""

from __future__ import annotations

import argparse
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayva.commands import chat
from rayva.errors import DataError, ServingError
from rayva.model.folder import Assistant
from tests.serving.conftest import data_uri, picture, question
from tests.serving.test_api import direct_answer


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str, code: int = 0) -> None:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert chat.run(parser.parse_args(arguments)) == code


MODELS = json.dumps({"object": "list", "data": [{"id": "m"}]}).encode()


@contextmanager
def other_endpoint(models: bytes = MODELS, answer: bytes = b"") -> Iterator[str]:
    """A server of someone else's, which answers GET and POST with these bytes and closes the connection."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(answer)

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


@pytest.mark.parametrize("where", ["url", "model"])
def test_a_dialogue_about_a_picture(
    where: str,
    url: str,
    model_folder: Path,
    assistant: Assistant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture(8))
    target = {"url": ["--url", url], "model": ["--model", str(model_folder)]}[where]
    talk(monkeypatch, "What is it?\n/new\nWhere?\n", *target, "--image", str(file), "--max-tokens", "12")
    expected = [
        direct_answer(assistant, question(words, data_uri(picture(8))), 12)
        for words in ("What is it?", "Where?")
    ]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_a_second_question_goes_on_with_the_first(
    url: str, assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, "What?\nWhere?\n/quit\nnever asked\n", "--url", url, "--max-tokens", "12")
    first = direct_answer(assistant, question("What?"), 12)
    conversation = [*question("What?"), {"role": "assistant", "content": first}, *question("Where?")]
    assert capsys.readouterr().out == f"{first}\n{direct_answer(assistant, conversation, 12)}\n"


def test_a_refusal_is_told_and_the_dialogue_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"no picture")
    talk(monkeypatch, f"/image {file}\nWhat?\n/image /nowhere\n", "--url", url, code=2)
    told = capsys.readouterr().err
    assert "refuses (400): image 0" in told
    assert "/nowhere" in told


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServingError, match="cannot be reached"):
        talk(monkeypatch, "", "--url", "http://127.0.0.1:9")
    with pytest.raises(ServingError, match="which model"):
        talk(monkeypatch, "")
    with pytest.raises(DataError, match="missing"):
        talk(monkeypatch, "", "--url", "http://127.0.0.1:9", "--image", "/missing.png")
    for url in ("http://[::1", "ftp://127.0.0.1", "127.0.0.1:8000"):
        with pytest.raises(ServingError, match="no address of an endpoint"):
            talk(monkeypatch, "", "--url", url)
    for url in ("http://127.0.0.1:x", "http://", "http://127.0.0.1:9/a b", "http://ä.invalid/ä"):
        with pytest.raises(ServingError, match="cannot be reached"):
            talk(monkeypatch, "", "--url", url)


@pytest.mark.parametrize("body", [b"<html>Hello</html>", b'{"x": 1}', b"[]", b"", b"\xff", b'{"data": [1]}'])
def test_a_server_that_is_no_endpoint(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with other_endpoint(models=body) as url, pytest.raises(ServingError, match="OpenAI-compatible"):
        talk(monkeypatch, "", "--url", url)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Hello</html>",
        b'{"choices": []}',
        b"data: {}\n\n",
        b"data: 3\n\n",
        b"data: \xff\n\n",
        b"data: <\n\n",
    ],
)
def test_an_answer_that_is_none(
    body: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_endpoint(answer=body) as url:
        talk(monkeypatch, "What?\n", "--url", url, code=2)
    assert "OpenAI-compatible" in capsys.readouterr().err


@pytest.mark.parametrize(
    "end", [b"data: [DONE]\n\n", chunk("", "stop"), chunk("", "length") + b"data: [DONE]\n\n"]
)
def test_comments_and_other_fields_of_a_stream_are_skipped(
    end: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b": keep-alive\n\nevent: chunk\nid: 1\n" + chunk("a ") + b": keep-alive\n\n" + chunk("cat") + end
    with other_endpoint(answer=body) as url:
        talk(monkeypatch, "What?\n", "--url", url)
    assert capsys.readouterr().out == "a cat\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b": keep-alive\n\n",
        b'data: {"cho',
        chunk("half an"),
        chunk("half an") + b'data: {"cho',
        chunk("half an") + b"data: \xc3",
    ],
)
def test_an_answer_that_breaks_off_is_an_error(
    body: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_endpoint(answer=body) as url:
        talk(monkeypatch, "What?\n", "--url", url, code=2)
    said, errors = capsys.readouterr()
    assert "broke off" in errors
    assert said == ("half an\n" if b"half" in body else "")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_line_that_is_no_text(locale: str) -> None:
    with other_endpoint(answer=chunk("x", "stop")) as url:
        done = subprocess.run(
            [sys.executable, "-m", "rayva.cli", "chat", "--url", url],
            input=b"caf\xe9\n",
            env={**os.environ, "PYTHONPATH": "platform", "LC_ALL": locale},
            capture_output=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: A line of the input is not text in UTF-8")


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5"])
def test_a_length_of_nothing_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--url", "http://127.0.0.1:9", "--max-tokens", wrong])
    assert "at least 1" in capsys.readouterr().err


def test_a_key_that_no_header_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYVA_API_KEY", "schlüssel")
    with pytest.raises(ServingError, match="RAYVA_API_KEY"):
        talk(monkeypatch, "", "--url", "http://127.0.0.1:9")
