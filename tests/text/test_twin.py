"""Text can never become a control token; everything else is the tokenizer's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rayva.errors import WeightsError
from rayva.text.conversation import Message
from rayva.text.encode import encode_sample
from rayva.text.templates import get_template
from rayva.text.twin import TokenizerTwin, twin_of
from tests.reference import TOKENIZER, needs


@pytest.mark.parametrize("kind", ["llama_like", "legacy_llama_like", "byte_level", "without_bos"])
def test_ordinary_text_is_encoded_as_the_tokenizer_does(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    twin = twin_of(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30))
    def check(text: str) -> None:
        assert twin.encode(text)[0] == tokenizer(text, add_special_tokens=False).input_ids

    check()


@pytest.mark.parametrize("kind", ["llama_like", "byte_level", "without_bos"])
def test_control_tokens_are_reached_by_markup_alone(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    twin = twin_of(tokenizer)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        written = f"a{added.content}b"
        assert token_id not in twin.encode(written)[0]
        assert tokenizer.decode(twin.encode(written)[0]) == written
        assert twin.encode(twin.markup(written))[0] == tokenizer(written, add_special_tokens=False).input_ids


def test_vocabularies_that_spell_out_their_control_tokens() -> None:
    """Unigram and word-level models have "</s>" among their words and would match it in text."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "boat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("boat", -1.0), (" ", -2.0)], unk_id=0)
    )
    for backend in (words, unigram):
        backend.add_special_tokens(["</s>"])
        twin = twin_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
        assert 1 not in twin.encode("boat </s>")[0]
        assert twin.encode("boat " + twin.markup("</s>"))[0][-1] == 1


def normalising_llama(tokenizer: PreTrainedTokenizerBase, normalized: bool) -> PreTrainedTokenizerBase:
    """As older conversions of Llama: spaces by a normaliser, which control tokens may go through too."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spec |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    for token in spec["added_tokens"]:
        token["normalized"] = normalized
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_control_tokens_that_go_through_a_normaliser(llama_like: PreTrainedTokenizerBase) -> None:
    tokenizer = normalising_llama(llama_like, True)
    twin = twin_of(tokenizer)
    assert twin.eos is not None
    for before in ("boat", "boat ", " ", ""):
        ids = twin.encode(f"{before}{twin.eos}")[0]
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.eos_token_id not in twin.encode(f"{before}</s>")[0]
    messages = [Message("user", ("Hi",)), Message("assistant", ("a boat",))] * 2
    plain = normalising_llama(llama_like, False)
    for name in ("v0", "v1", "llama_2", "chatml"):
        encoded = encode_sample(messages, get_template(name, tokenizer), tokenizer)
        assert encoded == encode_sample(messages, get_template(name, plain), plain)


def test_a_control_token_that_is_lost_in_mid_text_is_refused(
    llama_like: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = normalising_llama(llama_like, True)
    monkeypatch.setattr(
        TokenizerTwin, "encode", lambda self, text: ([self._backend.token_to_id(text) or 0], [])
    )
    with pytest.raises(WeightsError, match="normaliser"):
        twin_of(tokenizer)


@needs(TOKENIZER)
@pytest.mark.parametrize("damage", ["length", "names", "prefix"])
def test_files_that_contradict_each_other(damage: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path)
    file = tmp_path / ("tokenizer_config.json" if damage == "length" else "tokenizer.json")
    spec = json.loads(file.read_text())
    if damage == "length":
        spec["model_max_length"] = "x"
    elif damage == "prefix":  # over which the library panics
        spec["post_processor"]["single"][0]["SpecialToken"]["id"] = "x"
    else:
        spec["added_tokens"][2]["content"] = "x"
    file.write_text(json.dumps(spec))
    # Beside this type of model, transformers takes tokenizer.json as it stands.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path))) as found:
        twin_of(tokenizer)
    assert "tokenizer.json" in str(found.value)


def test_added_words_and_runs_of_spaces_stay_tokens(byte_level: PreTrainedTokenizerBase) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    )
    tokenizer.add_tokens(["    ", "rayva", "<tool_call>"])
    spaces, word, tool = tokenizer.convert_tokens_to_ids(["    ", "rayva", "<tool_call>"])
    ids = twin_of(tokenizer).encode("a    rayva<tool_call>")[0]
    assert spaces in ids
    assert word in ids
    assert tool not in ids


def test_the_twin_follows_a_tokenizer_that_gains_tokens(byte_level: PreTrainedTokenizerBase) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    )
    before = twin_of(tokenizer)
    assert twin_of(tokenizer) is before
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    token_id = tokenizer.convert_tokens_to_ids("<image>")
    twin = twin_of(tokenizer)
    assert twin.encode(twin.markup("<image>"))[0] == [token_id]
    assert token_id not in twin.encode("<image>")[0]


def test_what_the_tokenizer_puts_in_front(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert twin_of(tokenizers["llama_like"]).prefix_ids == (tokenizers["llama_like"].bos_token_id,)
    assert twin_of(tokenizers["byte_level"]).prefix_ids == (tokenizers["byte_level"].bos_token_id,)
    assert twin_of(tokenizers["without_bos"]).prefix_ids == ()


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(WeightsError, match="no fast form"):
        twin_of(ByT5Tokenizer())
