"""Ids and labels equal the original LLaVA's, where it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayva.commands.inspect import Inspected, Inspector
from rayva.data.json_rows import JsonRow
from rayva.text.encode import IGNORE_INDEX
from rayva.text.templates import get_template

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden data not found at {GOLDEN}")

NAMES = ("plain", "v0", "v1", "llama_2")
CONTROLS = ("<s>", "</s>", "<unk>")
END = {"plain": "\n", "v0": "\n###", "v1": "</s>", "llama_2": " </s>"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    listed = json.loads((GOLDEN / "templates" / "conversations.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in listed}


def golden_records(name: str) -> tuple[list[dict[str, Any]], int]:
    golden = json.loads((GOLDEN / "templates" / f"{name}.json").read_text(encoding="utf-8"))
    return golden["records"], golden["meta"]["model_max_length"]


def see(row: dict[str, Any], name: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Inspected:
    """As `rayva inspect` shows a row. Like the original, it cuts rows without images only."""
    template = get_template(name, tokenizer)
    return Inspector(tokenizer, template, max_tokens=max_tokens).inspect(JsonRow(0, row))


def has_control_text(row: dict[str, Any]) -> bool:
    return any(control in turn["value"] for turn in row["conversations"] for control in CONTROLS)


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_original(
    name: str, tokenizer: PreTrainedTokenizerBase, rows: dict[str, dict[str, Any]]
) -> None:
    records, model_max_length = golden_records(name)
    compared = 0
    for record in records:
        row = rows[record["id"]]
        if record.get("error") or record["warning"] or has_control_text(row):
            continue
        encoded = see(row, name, tokenizer, model_max_length).encoded
        assert encoded.prompt == record["prompt"], record["id"]
        assert encoded.input_ids == record["input_ids"], record["id"]
        if name != "v0":
            # The original's v0 also supervises its own headers and parts of questions.
            assert encoded.labels == record["labels"], record["id"]
        compared += 1
    assert compared >= 20


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_supervised_where_the_original_drops_or_leaks(
    name: str, tokenizer: PreTrainedTokenizerBase, rows: dict[str, dict[str, Any]]
) -> None:
    for record in golden_records(name)[0]:
        if record.get("error") or not (record["warning"] or name == "v0"):
            continue
        row = rows[record["id"]]
        encoded = see(row, name, tokenizer, 1_000_000).encoded
        assert encoded.prompt == record["prompt"], record["id"]
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        supervised = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
        wanted = " ".join(answer + END[name] for answer in answers)
        # The decoder strips the separator in front of the very first answer.
        assert supervised == (wanted if answers[0] else wanted.removeprefix(" ")), record["id"]


def test_control_tokens_in_answers_stay_text(
    tokenizer: PreTrainedTokenizerBase, rows: dict[str, dict[str, Any]]
) -> None:
    tried = [row for row in rows.values() if has_control_text(row)]
    assert tried
    for row in tried:
        encoded = see(row, "v1", tokenizer, 2048).encoded
        answers = sum(turn["from"] == "gpt" for turn in row["conversations"])
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
        assert encoded.input_ids.count(tokenizer.eos_token_id) == answers
        assert tokenizer.unk_token_id not in encoded.input_ids
