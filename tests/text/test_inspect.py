"""`rayva inspect`: what it tells about good and bad rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rayva.commands.inspect import Inspector, write_json, write_report
from rayva.data.json_rows import read_json_rows
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from rayva.text.templates import get_template


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS: list[Any] = [
    {"id": "good", "image": "a.png", "conversations": turns("What is it? <image>", "A boat.")},
    {"id": "text", "conversations": turns("Write <image> and </s>.", "<image> </s>")},
    {"id": "long", "conversations": turns("Go on.", "The boat is green. " * 80)},
    {"id": "long-image", "image": "a.png", "conversations": turns("<image>", "The boat is green. " * 80)},
    {"id": "markers", "image": "a.png", "conversations": turns("<image>\n<image>\nCompare.", "Equal.")},
    {"id": "role", "conversations": [{"from": "robot", "value": "hi"}, {"from": "gpt", "value": "x"}]},
    {"id": "nothing"},
    {"id": "surrogate", "conversations": turns("\ud800", "x")},
    "not an object",
]
REJECTED = ("markers", "role", "nothing", "surrogate", "row-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def inspector(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Inspector:
    return Inspector(tokenizer, get_template("v1", tokenizer), max_tokens=300, image_tokens=16, **options)


def as_json(data: Path, inspecting: Inspector) -> dict[str, dict[str, Any]]:
    out = io.StringIO()
    write_json((inspecting.inspect(row) for row in read_json_rows(str(data), "data")), out)
    return {record["id"]: record for record in map(json.loads, out.getvalue().splitlines())}


def test_every_row_is_reported_with_its_status(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    records = as_json(data, inspector(llama_like))
    assert len(records) == len(ROWS)
    statuses = {row_id: record["status"] for row_id, record in records.items()}
    assert statuses == {
        **{"good": "ok", "text": "ok", "long": "truncated", "long-image": "truncated"},
        **dict.fromkeys(REJECTED, "rejected"),
    }
    assert all(bool(record["reason"]) == (record["status"] != "ok") for record in records.values())
    assert records["role"]["reason"] == "unknown_role"
    assert all(len(record["input_ids"]) == len(record["labels"]) for record in records.values())


def test_what_is_supervised(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    records = as_json(data, inspector(llama_like))
    learnt = {
        row_id: llama_like.decode([label for label in record["labels"] if label != IGNORE_INDEX])
        for row_id, record in records.items()
    }
    assert learnt["good"] == "A boat.</s>"
    assert learnt["text"] == "<image> </s></s>"
    assert records["good"]["prompt"].endswith("USER: <image>\nWhat is it? ASSISTANT: A boat.</s>")
    assert records["good"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert records["text"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 0


def test_text_is_cut_and_rows_with_images_are_shown_whole(
    data: Path, llama_like: PreTrainedTokenizerBase
) -> None:
    records = as_json(data, inspector(llama_like))
    assert len(records["long"]["input_ids"]) == 300
    assert records["long-image"]["labels"][-1] == llama_like.eos_token_id


def test_repeated_markers_are_shown_as_the_original_reads_them(
    data: Path, llama_like: PreTrainedTokenizerBase
) -> None:
    record = as_json(data, inspector(llama_like))["markers"]
    assert record["status"] == "rejected"
    assert record["input_ids"].count(IMAGE_TOKEN_INDEX) == 1


def test_the_image_stays_where_the_data_has_it(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    record = as_json(data, inspector(llama_like, image_position="data"))["good"]
    assert "USER: What is it? <image> ASSISTANT:" in record["prompt"]


def test_missing_images_reject_their_rows(
    data: Path, tmp_path: Path, llama_like: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "images").mkdir()
    inspecting = inspector(llama_like, images=str(tmp_path / "images"))
    assert as_json(data, inspecting)["good"]["status"] == "rejected"
    (tmp_path / "images" / "a.png").touch()
    inspecting = inspector(llama_like, images=str(tmp_path / "images"))
    assert as_json(data, inspecting)["good"]["status"] == "ok"


def test_the_report_adds_up(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    inspecting = inspector(llama_like)
    rows = [inspecting.inspect(row) for row in read_json_rows(str(data), "data")]
    out = io.StringIO()
    write_report(rows, out, llama_like, show=1, max_tokens=300)
    report = out.getvalue()
    usable = [row for row in rows if row.status != "rejected"]
    tokens, supervised = sum(row.kept for row in usable), sum(row.supervised for row in usable)
    assert f"{len(ROWS)} rows: {len(usable)} usable, {len(REJECTED)} rejected" in report
    assert f"{tokens:,} tokens with images, {supervised:,} (" in report
    assert "truncated 2: over 300 tokens" in report
    histogram = [line for line in report.splitlines() if line.startswith("   ") and " - " in line]
    assert sum(int(line.split()[-1]) for line in histogram) == len(usable)
    shown = [line.split(":")[0].removeprefix("== ") for line in report.splitlines() if line.startswith("== ")]
    assert {"good", "long", *REJECTED} >= set(shown) >= {"good", "long", "role"}


def test_the_report_obeys_no_terminal_codes(tmp_path: Path, llama_like: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "x", "conversations": turns("\033[2J", "\033[31mred")}]))
    inspecting = inspector(llama_like)
    out = io.StringIO()
    rows = (inspecting.inspect(row) for row in read_json_rows(str(path), "data"))
    write_report(rows, out, llama_like, show=1, max_tokens=300)
    assert "\033" not in out.getvalue()
    assert "\\x1b[31mred" in out.getvalue()
