"""What each template writes, in its training and its generation form."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rayva.errors import RecipeError
from rayva.text.conversation import IMAGE, BadConversation, Message
from rayva.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_prompt, encode_sample
from rayva.text.templates import get_template
from tests.text.conftest import byte_level_backend

EXCHANGES = [
    Message("user", (IMAGE, "\nq1")),
    Message("assistant", ("a1",)),
    Message("user", ("q2",)),
    Message("assistant", ("a2",)),
]
GENERATION = {
    "plain": "<image>a1\n",
    "v0": "S\n\n### Human: <image>\nq1\n### Assistant: a1\n### Human: q2\n### Assistant:",
    "v1": "S USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    "llama_2": "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]",
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nq1<|im_end|>\n<|im_start|>assistant\n"
        "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    ),
}
TRAINING_TAIL = {
    "plain": "a2\n",
    "v0": " a2\n### ",
    "v1": " a2</s>",
    "llama_2": " a2 </s>",
    "chatml": "a2<|im_end|>\n",
}


@pytest.mark.parametrize("name", list(GENERATION))
def test_training_text_is_the_prompt_and_the_answer(name: str, llama_like: PreTrainedTokenizerBase) -> None:
    template = get_template(name, llama_like, system="S")
    encoded = encode_sample(EXCHANGES, template, llama_like)
    assert encoded.prompt == GENERATION[name] + TRAINING_TAIL[name]
    prompt = encode_prompt(EXCHANGES[:3], template, llama_like)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != IGNORE_INDEX
    assert prompt[0] == llama_like.bos_token_id


@pytest.mark.parametrize("name", list(GENERATION))
def test_an_empty_system_message_is_left_out(name: str, llama_like: PreTrainedTokenizerBase) -> None:
    template = get_template(name, llama_like, system="")
    prompt = encode_sample(EXCHANGES, template, llama_like).prompt
    begins = {"plain": "<image>", "v0": "### Human: ", "v1": "USER: ", "llama_2": "[INST] <image>"}
    assert prompt.startswith(begins.get(name, "<|im_start|>user\n"))


def test_a_conversations_own_system_message_wins(llama_like: PreTrainedTokenizerBase) -> None:
    own = [Message("system", ("Be brief.",)), *EXCHANGES]
    prompt = encode_sample(own, get_template("v1", llama_like, system="S"), llama_like).prompt
    assert prompt.startswith("Be brief. USER: ")


def test_stop_strings(llama_like: PreTrainedTokenizerBase, byte_level: PreTrainedTokenizerBase) -> None:
    assert get_template("v0", llama_like).stop == ("###",)
    assert get_template("v1").stop == get_template("v1", llama_like).stop == ("</s>",)
    assert get_template("llama_2", byte_level).stop == ("<|end|>",)
    assert get_template("chatml", byte_level).stop == ("<|im_end|>",)
    assert get_template("plain").stop == ("\n",)
    assert get_template("tokenizer", byte_level).stop == ("<|im_end|>", "<|end|>")


def test_unknown_templates_and_missing_chat_templates_are_named(llama_like: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RecipeError, match=r"vicuna(.|\n)*llama_2"):
        get_template("vicuna")
    with pytest.raises(RecipeError, match="no chat template"):
        get_template("tokenizer", llama_like)


@pytest.mark.parametrize("name", ["v1", "tokenizer"])
def test_generation_needs_a_question(name: str, byte_level: PreTrainedTokenizerBase) -> None:
    for messages in ([], EXCHANGES):
        with pytest.raises(BadConversation) as caught:
            encode_prompt(messages, get_template(name, byte_level), byte_level)
        assert caught.value.reason == "no_question"


def test_the_tokenizers_own_eos_ends_answers(byte_level: PreTrainedTokenizerBase) -> None:
    encoded = encode_sample(EXCHANGES, get_template("v1", byte_level), byte_level)
    assert encoded.labels.count(byte_level.eos_token_id) == 2
    assert encoded.prompt.endswith("ASSISTANT: a2<|end|>")


def test_a_last_empty_answer_teaches_to_stop(llama_like: PreTrainedTokenizerBase) -> None:
    messages = [Message("user", ("q",)), Message("assistant", ("",))]
    encoded = encode_sample(messages, get_template("v1", llama_like), llama_like)
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == [llama_like.eos_token_id]


class TestOwnChatTemplate:
    def test_equal_to_apply_chat_template(self, byte_level: PreTrainedTokenizerBase) -> None:
        template = get_template("tokenizer", byte_level, system="S")
        texts = ["q1", "a1", "q2", "a2"]
        chat = [{"role": "system", "content": "S"}] + [
            {"role": message.role, "content": text} for message, text in zip(EXCHANGES, texts, strict=True)
        ]
        plain = [Message(m.role, (text,)) for m, text in zip(EXCHANGES, texts, strict=True)]
        whole = byte_level.apply_chat_template(chat, tokenize=True, return_dict=False)
        asked = byte_level.apply_chat_template(
            chat[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encode_sample(plain, template, byte_level).input_ids == whole
        assert encode_prompt(plain[:-1], template, byte_level) == asked

    def test_answers_and_their_end_markers_are_supervised(self, byte_level: PreTrainedTokenizerBase) -> None:
        encoded = encode_sample(EXCHANGES, get_template("tokenizer", byte_level), byte_level)
        supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
        assert byte_level.decode(supervised) == "a1<|im_end|>a2<|im_end|>"
        assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == 1

    def test_what_is_given_in_front_of_an_answer_is_not_supervised(self) -> None:
        """Llama-2's form: the prompt ends before the space that the model begins its answer with."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_backend(), bos_token="<|begin|>", eos_token="<|end|>"
        )
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'user' %}"
            "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
        )
        template = get_template("tokenizer", tokenizer)
        encoded = encode_sample(EXCHANGES, template, tokenizer)
        supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(supervised) == " a1 <|end|> a2 <|end|>"
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 2
        prompt = encode_prompt(EXCHANGES[:3], template, tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt

    def test_it_can_be_sent_to_a_worker(self, byte_level: PreTrainedTokenizerBase) -> None:
        template = get_template("tokenizer", byte_level)
        expected = encode_sample(EXCHANGES, template, byte_level)
        sent, tokenizer = pickle.loads(pickle.dumps((template, byte_level)))
        assert encode_sample(EXCHANGES, sent, tokenizer) == expected

    def test_refusals_and_lost_messages_are_reported(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token="<|end|>")
        for jinja in (
            "{{ raise_exception('roles must alternate') }}",
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        ):
            tokenizer.chat_template = jinja
            with pytest.raises(BadConversation) as caught:
                encode_sample(EXCHANGES, get_template("tokenizer", tokenizer), tokenizer)
            assert caught.value.reason == "chat_template"


def test_a_control_token_that_swallows_spaces_leaves_the_answers() -> None:
    """Some tokenizers declare control tokens with rstrip, for the line break that follows them."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token="<|end|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    messages = [Message("user", ("q",)), Message("assistant", ("  padded  ",))]
    encoded = encode_sample(messages, get_template("tokenizer", tokenizer), tokenizer)
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == "  padded  <|im_end|>"
