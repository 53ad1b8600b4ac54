"""The real LLaMA and Vicuna vocabulary, fetched when the test runs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_prompt, encode_sample
from rayva.text.templates import get_template
from tests.text.test_masks import conversations, expected_runs, supervised_runs, without_an_empty_end

PACKAGE = "llama-tokenizer-js@1.2.2"


def _fetch(folder: Path) -> str:
    """The package's source, with vocabulary and merges in base64; skips the test where npm cannot."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so the LLaMA vocabulary cannot be fetched")
    command = [npm, "pack", PACKAGE, "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm pack {PACKAGE} did not answer within 90 s")
    if done.returncode:
        pytest.skip(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-200:]}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        source = tar.extractfile("package/llama-tokenizer.js")
        assert source is not None
        return source.read().decode("utf-8")


def _constant(source: str, name: str) -> bytes:
    found = re.search(rf'{name} = "([A-Za-z0-9+/=]+)"', source)
    assert found is not None
    return base64.b64decode(found[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _fetch(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module", params=["first", "always"])
def llama(
    request: pytest.FixtureRequest, source: str, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """The vocabulary as a tokenizer with a prefix space at the very front, or after control tokens too."""
    folder = tmp_path_factory.mktemp("llama")
    vocab = _constant(source, "llama_vocab_base64").decode("utf-8").split("\n")
    packed = _constant(source, "llama_merges_binary")
    numbers = struct.unpack(f"<{len(packed) // 2}H", packed)
    merges = [[vocab[a], vocab[b]] for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    assert (len(vocab), len(merges)) == (32_000, 61_249)
    spec = _tokenizer_json(vocab, merges, request.param)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    return AutoTokenizer.from_pretrained(folder)


def _tokenizer_json(vocab: list[str], merges: list[list[str]], scheme: str) -> dict[str, object]:
    space = "\u2581"
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": vocab[index], **flags} for index in range(3)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": space,
            "prepend_scheme": scheme,
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: index for index, text in enumerate(vocab)},
            "merges": merges,
        },
    }


def test_it_is_the_real_vocabulary(llama: PreTrainedTokenizerBase) -> None:
    assert llama("Hello world").input_ids == [1, 15043, 3186]


MESSAGES = [
    Message("user", (IMAGE, "\nWhat is this?")),
    Message("assistant", ("A boat </s> and ASSISTANT: a <s> pier.",)),
    Message("user", ("USER: are you sure?",)),
    Message("assistant", ("  Yes.\n",)),
]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("v0", ["A boat </s> and ASSISTANT: a <s> pier.\n###", "  Yes.\n\n###"]),
        ("v1", ["A boat </s> and ASSISTANT: a <s> pier.</s>", "  Yes.\n</s>"]),
        ("llama_2", ["A boat </s> and ASSISTANT: a <s> pier. </s>", "  Yes.\n </s>"]),
        ("chatml", ["A boat </s> and ASSISTANT: a <s> pier.<|im_end|>", "  Yes.\n<|im_end|>"]),
    ],
)
def test_answers_and_their_end_markers_are_supervised(
    name: str, runs: list[str], llama: PreTrainedTokenizerBase
) -> None:
    encoded = encode_sample(MESSAGES, get_template(name, llama), llama)
    grouped = groupby(encoded.labels, key=lambda label: label != IGNORE_INDEX)
    decoded = [llama.decode(list(run)) for supervised, run in grouped if supervised]
    # The decoder strips one space at the beginning of a text: v1's separator, or the answer's own.
    assert decoded == [run if name in ("v0", "v1", "llama_2") else run.removeprefix(" ") for run in runs]
    eos = 2 if name in ("v1", "llama_2") else 0
    assert encoded.input_ids.count(llama.eos_token_id) == eos


@pytest.mark.parametrize("name", ["v0", "v1", "llama_2", "chatml"])
def test_random_conversations(
    name: str,
    llama: PreTrainedTokenizerBase,
    decode_in_context: Callable[[PreTrainedTokenizerBase, list[int]], str],
) -> None:
    """Supervised are the answers with their end markers; the prompt is what stands before the last answer."""
    template = get_template(name, llama)

    @settings(max_examples=40, deadline=None)
    @given(messages=conversations())
    def check(messages: list[Message]) -> None:
        encoded = encode_sample(messages, template, llama)
        decoded = [decode_in_context(llama, run) for run in supervised_runs(encoded)]
        assert decoded == expected_runs(name, messages, "</s>")
        if name == "llama_2" and without_an_empty_end(messages) is not messages:
            messages = list(without_an_empty_end(messages))
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        if not messages[last].text and last < len(messages) - 1:
            return  # v1 and llama_2 write no end marker for it, as the original does
        prompt = encode_prompt(messages[:last], template, llama)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORE_INDEX

    check()


def test_ids_of_a_v1_conversation(llama: PreTrainedTokenizerBase) -> None:
    """`USER` is one piece after </s>, or two with a space; a text after an image begins with a space."""
    messages = [
        *(Message("user", (IMAGE, "\nHi")), Message("assistant", ("Hello world",))),
        *(Message("user", ("Hi",)), Message("assistant", ("Hello",))),
    ]
    encoded = encode_sample(messages, get_template("v1", llama, system=""), llama)
    assistant = [319, 1799, 9047, 13566, 29901]
    legacy = llama("</s>USER", add_special_tokens=False).input_ids == [2, 3148, 1001]
    user = [3148, 1001] if legacy else [11889]
    first = [1, 3148, 1001, 29901, 29871, IMAGE_TOKEN_INDEX, 29871, 13, 18567, *assistant, 15043, 3186, 2]
    second = [*user, 29901, 6324, *assistant, 15043, 2]
    assert encoded.input_ids == first + second
    ignored = [IGNORE_INDEX]
    labels = [*ignored * (len(first) - 3), *first[-3:], *ignored * (len(second) - 2), *second[-2:]]
    assert encoded.labels == labels
