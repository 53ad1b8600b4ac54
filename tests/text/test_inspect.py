"""`rayva inspect`: what it tells about good and bad rows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayva.cli import main
from rayva.commands.inspect import Inspector, write_json, write_report
from rayva.data.json_rows import read_json_rows
from rayva.data.schema import SAMPLES
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from rayva.text.templates import get_template
from rayva.training.dataset import SampleSource, TextSettings


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS: list[Any] = [
    {"id": "good", "image": "a.png", "conversations": turns("What is it? <image>", "A boat.")},
    {"id": "text", "conversations": turns("Write <image> and </s>.", "<image> </s>")},
    {"id": "long", "conversations": turns("Go on.", "The boat is green. " * 80)},
    {"id": "long-image", "image": "a.png", "conversations": turns("<image>", "The boat is green. " * 80)},
    {"id": "twice", "image": "a.png", "conversations": turns("<image>\n<image>\nCompare.", "Equal.")},
    {
        "id": "markers",
        "image": "a.png",
        "conversations": [*turns("<image>\nWhat?", "A boat."), *turns("<image>\nAnd this?", "A pier.")],
    },
    {"id": "quiet", "conversations": [*turns("Say nothing.", ""), *turns("Now?", " ")]},
    {
        "id": "greeted",
        "conversations": [
            *({"from": "gpt", "value": "Hello."}, *turns("Hi", "Yes?")),
            {"from": "human", "value": "Bye"},
        ],
    },
    {"id": "role", "conversations": [{"from": "robot", "value": "hi"}, {"from": "gpt", "value": "x"}]},
    {"id": "nothing"},
    {"id": "surrogate", "conversations": turns("\ud800", "x")},
    "not an object",
    {"id": "\ud800", "conversations": turns("q", "a")},
    {"id": ["x"], "conversations": turns("q", "a")},
]
REJECTED = ("markers", "role", "nothing", "surrogate", "row-11", "\\ud800")
KEPT = ("good", "text", "twice", "quiet", "greeted", "row-13")


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
        **dict.fromkeys(KEPT, "ok"),
        **{"long": "truncated", "long-image": "truncated"},
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
    records = as_json(data, inspector(llama_like))
    assert records["twice"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert "USER: <image>\nCompare. ASSISTANT:" in records["twice"]["prompt"]
    assert records["markers"]["reason"] == "more_images_in_text_than_given"
    assert records["markers"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 2


def test_empty_answers_and_what_answers_nothing(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    records = as_json(data, inspector(llama_like))
    assert records["quiet"]["prompt"].endswith("USER: Say nothing. ASSISTANT:USER: Now? ASSISTANT:  </s>")
    assert records["greeted"]["prompt"].endswith("questions. USER: Hi ASSISTANT: Yes?</s>USER: Bye ")
    template = get_template("v0", llama_like)
    greeted = as_json(data, Inspector(llama_like, template))["greeted"]
    assert "\n\n### Assistant: Hello.\n### Human: Hi\n" in greeted["prompt"]


def test_rows_that_the_recipe_drops_are_rejected(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    records = as_json(data, inspector(llama_like, over_length="drop"))
    for row_id in ("long", "long-image"):
        assert (records[row_id]["status"], records[row_id]["reason"]) == ("rejected", "over_max_tokens")


def test_the_image_stays_where_the_data_has_it(data: Path, llama_like: PreTrainedTokenizerBase) -> None:
    record = as_json(data, inspector(llama_like, image_position="data"))["good"]
    assert "USER: What is it? <image> ASSISTANT:" in record["prompt"]


def test_an_image_without_a_place_is_told(tmp_path: Path, llama_like: PreTrainedTokenizerBase) -> None:
    rows = [{"id": "none", "image": "a.png", "conversations": turns("What is it?", "A boat.")}, ROWS[0]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    records = as_json(tmp_path / "rows.json", inspector(llama_like))
    assert records["none"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert (records["none"]["status"], records["none"]["reason"]) == ("ok", None)
    out = io.StringIO()
    read = read_json_rows(str(tmp_path / "rows.json"), "data")
    write_report(map(inspector(llama_like).inspect, read), out, llama_like, 0, 300)
    assert "taken 1: no <image> in the text" in out.getvalue()


def test_random_places_are_those_of_training(tmp_path: Path, llama_like: PreTrainedTokenizerBase) -> None:
    good = [
        {"id": f"r{i}", "image": "a.png", "conversations": turns("<image>\nWhat?", "A boat.")}
        for i in range(30)
    ]
    bad = {"id": "bad", "conversations": []}  # the data step puts it aside: it counts for nothing
    (tmp_path / "rows.json").write_text(json.dumps([good[0], bad, *good[1:]]))
    records = as_json(tmp_path / "rows.json", inspector(llama_like, image_position="random", seed=3))
    shown = [records[f"r{i}"]["input_ids"] for i in range(30)]
    samples = pa.Table.from_pylist(
        [
            {
                "sample_id": row["id"], "image_ids": ["a"], "kind": "user",
                "turns": [
                    {"role": turn["from"], "text": turn["value"]} for turn in row["conversations"]
                ],
            }
            for row in good
        ],
        schema=SAMPLES,
    )  # fmt: skip
    text = TextSettings(get_template("v1", llama_like), image_position="random", seed=3)
    source = SampleSource(samples, pa.array(["a"]), OneToken(), text, llama_like)
    trained = [source.example(i, 0, Counter()) for i in range(30)]
    assert shown == [example.input_ids for example in trained if example]
    assert len({tuple(ids) for ids in shown}) == 2  # before and after the text


class OneToken:
    """Features of one visual token an image."""

    num_tokens, encodes = 1, False

    def read(self, image_ids: Sequence[str]) -> list[Tensor]:
        return [torch.zeros(1, 4) for _ in image_ids]


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


def test_odd_rows_that_are_used_are_noted(tmp_path: Path, llama_like: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.json"
    rows = [
        {"id": "none", "picture": "a.png", "conversations": turns("<image>\nq", "a")},
        {"id": "twice", "images": ["a.png"], "conversations": turns("<image><image>\nq", "a")},
        {"id": "without", "images": ["a.png"], "conversations": turns("q", "a")},
    ]
    path.write_text(json.dumps(rows))
    inspecting = inspector(llama_like)
    notes = [inspecting.inspect(row).note for row in read_json_rows(str(path), "data")]
    assert [note and note[:12] for note in notes] == ["no image, so", "<image> repe", "no <image> i"]


def test_the_report_obeys_no_terminal_codes(tmp_path: Path, llama_like: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "x", "conversations": turns("\033[2J", "\033[31mred")}]))
    inspecting = inspector(llama_like)
    out = io.StringIO()
    rows = (inspecting.inspect(row) for row in read_json_rows(str(path), "data"))
    write_report(rows, out, llama_like, show=1, max_tokens=300)
    assert "\033" not in out.getvalue()
    assert "\\x1b[31mred" in out.getvalue()


@pytest.fixture(scope="module")
def tokenizer_folder(llama_like: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    llama_like.save_pretrained(folder)
    return folder


def command(data: Path, tokenizer: Path, *options: str) -> int:
    return main(["inspect", str(data), "--tokenizer", str(tokenizer), "--template", "v1", *options])


def test_the_command_prints_one_object_a_line(
    data: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(data, tokenizer_folder, "--json", "--limit", "3") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["id"] for record in records] == ["good", "text", "long"]
    assert all(
        record.keys() == {"id", "prompt", "input_ids", "labels", "status", "reason"} for record in records
    )


def test_the_command_reports(data: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(data, tokenizer_folder, "--show", "99") == 0
    report = capsys.readouterr().out
    assert report.count("\n== ") + report.startswith("== ") == len(ROWS)
    report.encode("utf-8")


def test_what_the_command_cannot_read_is_an_error_with_a_remedy(
    data: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "gone.json", tokenizer_folder) == 2
    assert "gone.json cannot be read: it does not exist" in capsys.readouterr().err
    data.write_text(data.read_text()[:-40])
    assert command(data, tokenizer_folder, "--json") == 2
    assert f"{data} is not JSON: line 1, column" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command(data, tokenizer_folder, "--limit", "-1")
    assert "--limit" in capsys.readouterr().err
    assert command(data, tmp_path / "no-tokenizer") == 2
    assert "no-tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text((json.dumps({"conversations": turns("Go on.", "The boat is green.")}) + "\n") * 5000)
    arguments = ["inspect", str(path), "--tokenizer", str(tokenizer_folder), "--template", "v1", "--json"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "rayva.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(root / "platform")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["status"] == "ok"
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    assert process.wait(timeout=60) == 0
