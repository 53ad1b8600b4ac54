"""Ids and labels equal the original LLaVA's, where it is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayva.commands.inspect import Inspected, Inspector
from rayva.data.json_rows import JsonRow
from rayva.text.encode import IGNORE_INDEX
from rayva.text.templates import get_template
from tests.reference import TEMPLATES, TOKENIZER, needs
from tests.text import original

pytestmark = needs(TEMPLATES)

NAMES = ("plain", "v0", "v1", "llama_2")
CONTROLS = ("<s>", "</s>", "<unk>")
END = {"plain": "\n", "v0": "\n###", "v1": "</s>", "llama_2": " </s>"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    listed = json.loads((TEMPLATES / "conversations.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in listed}


def golden_records(name: str) -> tuple[list[dict[str, Any]], int]:
    golden = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_original(
    name: str, tokenizer: PreTrainedTokenizerBase, rows: dict[str, dict[str, Any]]
) -> None:
    for record in golden_records(name)[0]:
        if record.get("error"):
            with pytest.raises(AssertionError):
                original.read(name, rows[record["id"]], tokenizer)
        elif "<unk>" not in record["prompt"]:  # which the original takes for padding
            prompt, input_ids, labels = original.read(name, rows[record["id"]], tokenizer)
            assert (prompt, input_ids) == (record["prompt"], record["input_ids"]), record["id"]
            if name != "v0":
                assert labels == (None if record["warning"] else record["labels"]), record["id"]


PIECES = (
    *("USER: ", "ASSISTANT:", " ASSISTANT: ", "### Human: ", "###", "\n### ", "[INST] ", "[/INST] "),
    "<<SYS>>",
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\ufeff", "\0", "<", "s>", "\u2026"),
    *("\u00bd", "\u56fe\u7247", "\u043b\u043e", "e\u0301", "\U0001f642", "\U0001f469\u200d\U0001f467"),
    *("\u0645\u0631", "<div>", "a", "The", " boat is", "What", " the harbor?", "yes", "1", "23", "0.5", "!"),
    "word " * 30,
)  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
# The original takes these in a question for the end of the question, and learns a part of it.
ENDS = ("ASSISTANT:", "[/INST]")
QUESTION = TEXT.filter(lambda text: not any(end in text for end in ENDS))
PLACES = ("<image>\n{}", "{}\n<image>", "{} <image> {}", "<image>\n<image>\n{}", "<image>")


@st.composite
def llava_rows(draw: st.DrawFn, max_rounds: int) -> dict[str, Any]:
    """With an image in some turn or without; with a greeting, empty turns, a last question."""
    questions = draw(st.lists(QUESTION, min_size=1, max_size=max_rounds))
    image = draw(st.sampled_from([None, 0, 0, len(questions) - 1]))
    if image is not None:
        questions[image] = draw(st.sampled_from(PLACES)).replace("{}", questions[image])
    turns = [("gpt", draw(TEXT))] if draw(st.integers(0, 9)) == 9 else []
    for question in questions:
        turns += [("human", question), ("gpt", draw(TEXT))]
    if draw(st.integers(0, 9)) == 9:
        turns.append(("human", draw(QUESTION)))
    row = {"id": "r", "conversations": [{"from": role, "value": text} for role, text in turns]}
    return row if image is None else {**row, "image": "a.jpg"}


@pytest.mark.parametrize("name", NAMES)
def test_random_rows_are_read_as_the_original_reads_them(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    @settings(max_examples=120, deadline=None)
    @given(llava_rows(max_rounds=1 if name == "plain" else 3))
    def check(row: dict[str, Any]) -> None:
        assume(not has_control_text(row))
        texts = {turn["value"] for turn in row["conversations"]}
        # Behind an empty question the original takes them in an answer for the answer's beginning.
        assume("" not in texts or not any(end in text for text in texts for end in ENDS))
        try:
            prompt, input_ids, labels = original.read(name, row, tokenizer)
        except AssertionError:
            assume(False)
        encoded = see(row, name, tokenizer, original.MAX_LENGTH).encoded
        if name == "v0" or labels is not None:
            assert encoded.prompt == prompt
            assert encoded.input_ids == input_ids
        if labels is not None:
            assert encoded.labels == labels

    check()
