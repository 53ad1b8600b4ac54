"""Supervised tokens are the answers with their end markers, whatever the text and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rayva.text.conversation import IMAGE, Message, MessageRole
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, encode_prompt, encode_sample
from rayva.text.templates import get_template

Tokenizers = dict[str, PreTrainedTokenizerBase]
Decode = Callable[[PreTrainedTokenizerBase, list[int]], str]

KINDS = ("llama_like", "legacy_llama_like", "byte_level", "without_bos")
SNIPPETS = (
    *("USER: ", " ASSISTANT: ", "### Human: ", "\n###", "### Assistant:", "[INST] ", " [/INST]", "<<SYS>>"),
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>", "<eos>", "<image>"),
    *(" ", "  ", "\n", "\n\n", "\t", "The small boat", "yes", ".", "\u56fe\u7247", "\u0301", "\U0001f642"),
)
# SentencePiece writes U+2581 for a space and cannot tell the two apart.
LETTERS = st.characters(codec="utf-8", exclude_characters="\u2581")
TEXT = st.lists(st.sampled_from(SNIPPETS) | st.text(LETTERS, max_size=4), max_size=5).map("".join)
QUESTION = st.tuples(st.booleans(), TEXT).map(lambda drawn: (IMAGE, drawn[1]) if drawn[0] else (drawn[1],))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """One to three exchanges, sometimes with a human turn at the end."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(QUESTION)))
        messages.append(Message("assistant", (draw(TEXT),)))
    if draw(st.booleans()):
        messages.append(Message("user", draw(QUESTION)))
    return messages


def supervised_runs(encoded: Encoded) -> list[list[int]]:
    runs = groupby(encoded.labels, key=lambda label: label != IGNORE_INDEX)
    return [list(run) for supervised, run in runs if supervised]


def without_an_empty_end(messages: Sequence[Message]) -> Sequence[Message]:
    """An empty question behind an answer, and what follows it if that is empty too, is not written."""
    kept = list(messages)
    while kept and not any(kept[-1].content):
        kept.pop()
    return kept if kept and kept[-1].role == "assistant" else messages


def expected_runs(name: str, messages: Sequence[Message], eos: str) -> list[str]:
    """What the model must produce, by the definition of each template."""
    if name == "llama_2":
        messages = without_an_empty_end(messages)
    last = len(messages) - 1
    runs: list[str] = []
    before = -1
    for index, message in enumerate(messages):
        answer = message.text
        if message.role != "assistant":
            continue
        if name in ("v1", "llama_2"):
            tail = {"v1": eos, "llama_2": f" {eos}"}[name]
            run = f" {answer}{tail}" if answer else tail if index == last else ""
            between = messages[before + 1 : index]
            if name == "llama_2" and runs and run and len(between) > 1 and all(m.is_empty for m in between):
                runs[-1] += run  # several empty messages are written as nothing: the answers touch
            else:
                runs += [run] if run else []
            before = index if run else before
        else:
            runs.append({"v0": f" {answer}\n###", "chatml": f"{answer}<|im_end|>"}[name])
    return runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v0", "v1", "llama_2", "chatml"])
def test_supervised_tokens_decode_to_the_answers(
    name: str, kind: str, tokenizers: Tokenizers, decode_in_context: Decode
) -> None:
    tokenizer = tokenizers[kind]
    template = get_template(name, tokenizer)

    @settings(max_examples=40, deadline=None)
    @given(messages=conversations())
    def check(messages: list[Message]) -> None:
        encoded = encode_sample(messages, template, tokenizer)
        decoded = [decode_in_context(tokenizer, run) for run in supervised_runs(encoded)]
        assert decoded == expected_runs(name, messages, tokenizer.eos_token)
        pairs = zip(encoded.input_ids, encoded.labels, strict=True)
        assert all(label in (IGNORE_INDEX, token_id) for token_id, label in pairs)
        assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == sum(m.num_images for m in messages)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_touch(kind: str, tokenizers: Tokenizers, decode_in_context: Decode) -> None:
    said = ("Hi", "yes", "", "", "", "no")
    messages = [Message("assistant" if n % 2 else "user", (text,)) for n, text in enumerate(said)]
    for count, runs in ((4, 1), (6, 1)):
        encoded = encode_sample(messages[:count], get_template("llama_2", tokenizers[kind]), tokenizers[kind])
        found = [decode_in_context(tokenizers[kind], run) for run in supervised_runs(encoded)]
        assert found == expected_runs("llama_2", messages[:count], tokenizers[kind].eos_token)
        assert len(found) == runs


@pytest.mark.parametrize("kind", KINDS)
def test_plain_supervises_captions(kind: str, tokenizers: Tokenizers, decode_in_context: Decode) -> None:
    tokenizer = tokenizers[kind]
    template = get_template("plain", tokenizer)

    @settings(max_examples=40, deadline=None)
    @given(caption=TEXT, question=QUESTION)
    def check(caption: str, question: tuple[str, ...]) -> None:
        messages = [Message("user", question), Message("assistant", (caption,))]
        encoded = encode_sample(messages, template, tokenizer)
        (run,) = supervised_runs(encoded)
        # SentencePiece begins each text with a space, unless it has one.
        prefix = " " if "llama" in kind and not caption.startswith(" ") else ""
        assert decode_in_context(tokenizer, run) == f"{prefix}{caption}\n"
        rest = [IMAGE_TOKEN_INDEX] * messages[0].num_images
        bos = tokenizer("", add_special_tokens=True).input_ids
        assert encoded.input_ids == [*bos, *rest, *run]

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v0", "v1", "llama_2", "chatml"])
def test_a_model_is_asked_exactly_as_it_was_taught(name: str, kind: str, tokenizers: Tokenizers) -> None:
    """The prompt's ids are those that stand before the answer in training: no token lies across."""
    tokenizer = tokenizers[kind]
    template = get_template(name, tokenizer)

    @settings(max_examples=40, deadline=None)
    @given(question=QUESTION, answer=TEXT)
    def check(question: tuple[str, ...], answer: str) -> None:
        asked = Message("user", question)
        prompt = encode_prompt([asked], template, tokenizer)
        taught = encode_sample([asked, Message("assistant", (answer,))], template, tokenizer)
        first = next(i for i, label in enumerate(taught.labels) if label != IGNORE_INDEX)
        assert taught.input_ids[:first] == prompt

    check()


@given(roles=st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=5), text=TEXT)
@settings(max_examples=40, deadline=None)
def test_any_order_of_roles_is_encoded(
    roles: list[MessageRole], text: str, byte_level: PreTrainedTokenizerBase
) -> None:
    messages = [Message(role, (text,)) for role in roles]
    for name in ("plain", "v0", "v1", "llama_2", "chatml"):
        encoded = encode_sample(messages, get_template(name, byte_level), byte_level)
        assert len(encoded.input_ids) == len(encoded.labels)
