"""Tokenizers of different kinds, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What colour is the small boat? ASSISTANT: The small boat is green.",
    "USER: How many birds are there? ASSISTANT: There are three birds near the pier.",
    "### Human: Where is the lamp?\n### Assistant: The lamp is beside the window.\n### ",
    "[INST] Describe the picture. [/INST] A tall tree stands in a quiet garden. ",
    "user\nIs the door open?\nassistant\nYes, the door is open.\n",
    "The old bridge crosses a wide river, and two people walk over it.",
] * 4

LLAMA_CONFIG = """{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
"unk_token": "<unk>", "add_bos_token": true, "add_eos_token": false, "legacy": %s}"""

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like SentencePiece model: byte fallback, identity normalisation, 450 pieces."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def _llama_like(model: Path, folder: Path, legacy: bool) -> PreTrainedTokenizerBase:
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "tokenizer_config.json").write_text(LLAMA_CONFIG % str(legacy).lower())
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama_like(
    sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    return _llama_like(sentencepiece_model, tmp_path_factory.mktemp("llama"), legacy=False)


@pytest.fixture(scope="session")
def legacy_llama_like(
    sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """As Vicuna's: a prefix space after every control token."""
    return _llama_like(sentencepiece_model, tmp_path_factory.mktemp("legacy"), legacy=True)


def byte_level_backend(vocab_size: int = 400) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerBase:
    """Byte-level BPE that puts a BOS in front, with ChatML control tokens and a chat template."""
    backend = byte_level_backend()
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def without_bos() -> PreTrainedTokenizerBase:
    """BPE over whole texts: no BOS, no pre-tokeniser, so that it merges across spaces, colons and lines."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<eos>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # The byte pieces are ordinary vocabulary, as in SentencePiece: only <eos> is a control token.
    plain = Tokenizer(models.BPE(**_bpe_parts(backend), byte_fallback=True))
    plain.decoder = backend.decoder
    plain.add_special_tokens([AddedToken("<eos>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def _bpe_parts(backend: Tokenizer) -> dict[str, object]:
    import json

    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@pytest.fixture(scope="session")
def tokenizers(
    llama_like: PreTrainedTokenizerBase,
    legacy_llama_like: PreTrainedTokenizerBase,
    byte_level: PreTrainedTokenizerBase,
    without_bos: PreTrainedTokenizerBase,
) -> dict[str, PreTrainedTokenizerBase]:
    return {
        "llama_like": llama_like,
        "legacy_llama_like": legacy_llama_like,
        "byte_level": byte_level,
        "without_bos": without_bos,
    }


@pytest.fixture(scope="session")
def decode_in_context() -> Callable[[PreTrainedTokenizerBase, list[int]], str]:
    """Decodes tokens from the middle of a text: decoders strip the space at a text's beginning."""

    def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
        anchor = tokenizer("x", add_special_tokens=False).input_ids
        before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
        return tokenizer.decode(anchor + ids, clean_up_tokenization_spaces=False)[len(before) :]

    return decode
