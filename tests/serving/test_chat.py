"""`rayva chat`, against an endpoint and against a folder."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest

from rayva.commands import chat
from rayva.errors import DataError, ServingError
from rayva.model.folder import Assistant
from tests.serving.conftest import data_uri, picture, question
from tests.serving.test_api import direct_answer


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> None:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert chat.run(parser.parse_args(arguments)) == 0


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
    talk(monkeypatch, f"/image {file}\nWhat?\n/image /nowhere\n", "--url", url)
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
