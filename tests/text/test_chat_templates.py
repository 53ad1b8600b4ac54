"""Tokenizers' own chat templates, in the styles of well-known families: masks, prompts, control tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rayva.errors import RecipeError
from rayva.model.import_chat import of_chat_template
from rayva.text.chat_rendering import render_chat
from rayva.text.conversation import IMAGE, BadConversation, Message, MessageRole
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, encode_prompt, encode_sample
from rayva.text.templates import get_template
from tests.text.conftest import byte_level_backend
from tests.text.test_masks import TEXT, conversations

HOSTILE = (
    "{{ 1/0 }}",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{{ 'a' * 10**15 }}",
    "{{ [][3]['a']['b'] }}",
    # These would end, but in nobody's lifetime.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
)
LOOP = "{% for m in messages %}"
# Each with the markup that the assistant has to write around its answer: before, after, after the last.
STYLES: dict[str, tuple[str, str, str, str]] = {
    "chatml_with_a_default_system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + LOOP
        + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        *("", "<|im_end|>", "<|im_end|>"),
    ),
    "llama_2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set text = system + m['content'] if loop.index0 == 0 else m['content'] %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        *(" ", " <|end|>", " <|end|>"),
    ),
    "llama_3": (
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        *("", "<|eot_id|>", "<|eot_id|>"),
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST]{{ ' ' + m['content'] }}[/INST]"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        *(" ", "<|end|>", "<|end|>"),
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + LOOP
        + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        *("", "<end_of_turn>", "<end_of_turn>"),
    ),
    "phi": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|eot_id|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        *("", "<|eot_id|>", "<|eot_id|>"),
    ),
    "thinking_is_shown_in_the_last_answer_only": (
        LOOP + "<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        *("", "<|im_end|>", "<|im_end|>"),
    ),
    "prompts_with_more_than_it_trains_with": (
        LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        *("", "<|im_end|>", "<|im_end|>"),
    ),
    "words_and_an_end_token": (
        LOOP + "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
        "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        *(" ", "<|end|>", "<|end|>"),
    ),
    "words_alone": (
        LOOP + "{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        *("", "\n\n", "\n\n"),
    ),
}  # fmt: skip
CONTROLS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]"),
    *("[/INST]", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<think>", "</think>"),
]
PLAIN_TEXT = st.text(st.sampled_from("abc xyz.?\u56fe\n"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)
Decode = Callable[[PreTrainedTokenizerBase, list[int]], str]


@pytest.fixture(scope="module")
def families() -> dict[str, PreTrainedTokenizerBase]:
    made: dict[str, PreTrainedTokenizerBase] = {}
    for style, (jinja, *_) in STYLES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_backend(),
            bos_token="<|begin|>",
            eos_token="<|end|>",
            clean_up_tokenization_spaces=False,
        )
        tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS})
        tokenizer.chat_template = jinja
        made[style] = tokenizer
    return made


def supervised_texts(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, decode: Decode) -> list[str]:
    runs = groupby(encoded.labels, key=lambda label: label != IGNORE_INDEX)
    return [decode(tokenizer, list(run)) for supervised, run in runs if supervised]


def wanted_texts(style: str, messages: Sequence[Message]) -> list[str]:
    _, before, end, last_end = STYLES[style]
    last = len(messages) - 1
    texts = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        thinks = style.startswith("thinking") and index == last
        lead = "<think>\n\n</think>\n\n" if thinks else before
        texts.append(lead + message.text + (last_end if index == last else end))
    return texts


@pytest.mark.parametrize("style", list(STYLES))
def test_answers_and_their_end_markers_are_supervised(
    style: str, families: dict[str, PreTrainedTokenizerBase], decode_in_context: Decode
) -> None:
    tokenizer = families[style]
    template = get_template("tokenizer", tokenizer)

    @settings(max_examples=25, deadline=None)
    @given(messages=conversations())
    def check(messages: list[Message]) -> None:
        encoded = encode_sample(messages, template, tokenizer)
        assert supervised_texts(encoded, tokenizer, decode_in_context) == wanted_texts(style, messages)
        assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == sum(m.num_images for m in messages)

    check()


@pytest.mark.parametrize("style", list(STYLES))
def test_a_model_is_asked_exactly_as_it_was_taught(
    style: str, families: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = families[style]
    template = get_template("tokenizer", tokenizer)

    @settings(max_examples=25, deadline=None)
    @given(messages=conversations())
    def check(messages: list[Message]) -> None:
        taught = encode_sample(messages, template, tokenizer)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = encode_prompt(messages[:index], template, tokenizer)
                assert taught.input_ids[: len(prompt)] == prompt
                assert taught.labels[len(prompt)] != IGNORE_INDEX
                assert taught.labels[len(prompt) - 1] == IGNORE_INDEX

    check()


@pytest.mark.parametrize("style", list(STYLES))
def test_what_is_typed_never_becomes_a_control_token(
    style: str, families: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = families[style]
    template = get_template("tokenizer", tokenizer)
    controls = set(tokenizer.all_special_ids)

    def controls_in(question: str, answer: str) -> list[int]:
        messages = [Message("user", (question,)), Message("assistant", (answer,))]
        return [
            token for token in encode_sample(messages, template, tokenizer).input_ids if token in controls
        ]

    neutral = controls_in("q", "a")

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.sampled_from([*CONTROLS, "<|begin|>", "<|end|>", "<image>", " "]), max_size=4), TEXT)
    def check(typed: list[str], text: str) -> None:
        assert controls_in("".join(typed) + text, text + "".join(typed)) == neutral

    check()


@pytest.mark.parametrize("style", list(STYLES))
def test_ordinary_texts_are_written_as_the_template_writes_them(
    style: str, families: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = families[style]
    template = get_template("tokenizer", tokenizer)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(PLAIN_TEXT, min_size=2, max_size=5))
    def check(texts: list[str]) -> None:
        roles: list[MessageRole] = ["user", "assistant"] * 3
        messages = [Message(role, (text,)) for role, text in zip(roles, texts, strict=False)]
        chat = [{"role": m.role, "content": m.text} for m in messages]
        written = tokenizer.apply_chat_template(chat, tokenize=False)
        encoded = encode_sample(messages, template, tokenizer)
        assert encoded.prompt == written
        assert encoded.input_ids == tokenizer(written, add_special_tokens=False).input_ids

    check()


def test_stop_strings(families: dict[str, PreTrainedTokenizerBase]) -> None:
    for style, tokenizer in families.items():
        end = STYLES[style][2]
        assert get_template("tokenizer", tokenizer).stop == tuple(
            dict.fromkeys([end.strip() or end, "<|end|>"])
        )


def test_a_greeting_is_left_out_where_the_template_has_no_place_for_it(
    families: dict[str, PreTrainedTokenizerBase],
) -> None:
    asked = [Message("user", (IMAGE, "\nq")), Message("assistant", ("a",))]
    greeted = [Message("assistant", ("Hello.",)), *asked]
    for style, tokenizer in families.items():
        template = get_template("tokenizer", tokenizer)
        prompt = encode_sample(greeted, template, tokenizer).prompt
        if style in ("llama_2", "mistral", "gemma"):
            assert prompt == encode_sample(asked, template, tokenizer).prompt
            assert encode_prompt(greeted[:2], template, tokenizer) == encode_prompt(
                asked[:1], template, tokenizer
            )
        else:
            assert "Hello." in prompt


def test_a_system_message_goes_where_the_template_puts_it_or_is_refused_at_once(
    families: dict[str, PreTrainedTokenizerBase],
) -> None:
    messages = [Message("user", ("q",)), Message("assistant", ("a",))]
    for style in ("chatml_with_a_default_system", "llama_2", "llama_3", "words_and_an_end_token"):
        template = get_template("tokenizer", families[style], system="Be brief.")
        prompt = encode_sample(messages, template, families[style]).prompt
        assert "Be brief." in prompt
        assert "Be kind." not in prompt
    for style in ("gemma", "mistral"):
        with pytest.raises(RecipeError, match="takes no system message"):
            get_template("tokenizer", families[style], system="Be brief.")
        with pytest.raises(BadConversation, match="refuses the roles"):
            encode_sample(
                [Message("system", ("s",)), *messages],
                get_template("tokenizer", families[style]),
                families[style],
            )


def test_a_template_that_breaks_is_reported(families: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token="<|end|>")
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(BadConversation, match="refuses the roles"):
        encode_sample([Message("user", ("q",))], get_template("tokenizer", tokenizer), tokenizer)


@pytest.mark.parametrize("code", HOSTILE)
def test_a_template_that_crashes_refuses_the_conversation(
    code: str, byte_level: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level, "chat_template", code)
    template = get_template("tokenizer", byte_level)
    with pytest.raises(BadConversation, match=r"refuses the roles user, assistant: \S"):
        template.training([Message("user", ("Hi",)), Message("assistant", ("Yes.",))])


@pytest.mark.parametrize("code", HOSTILE)
def test_a_checkpoints_template_that_crashes_is_told_by_its_file(
    code: str, byte_level: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(code)
    found, why = of_chat_template(byte_level, tmp_path)
    assert found is None
    assert "chat_template.jinja fails on a question about a picture: " in why


def test_a_long_conversation_is_written_by_its_template(families: dict[str, PreTrainedTokenizerBase]) -> None:
    """The bound on a template's steps is far from what conversations take; tracers are left as they were."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 500
    before = sys.gettrace()
    for tokenizer in families.values():
        written = render_chat(tokenizer, turns, False)
        assert written == tokenizer.apply_chat_template(turns, tokenize=False)
    assert sys.gettrace() is before
