"""Vocabularies that the tokenizer outgrew or that are padded, and chat templates of every tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rayva.errors import WeightsError
from rayva.model.export_hf_chat import chat_template
from rayva.model.folder import load_assistant
from rayva.model.import_language import write_tokenizer
from rayva.model.import_model import import_model
from rayva.model.import_parts import Choices
from rayva.model.language import cover_vocabulary, load_tokenizer
from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IMAGE_TOKEN_INDEX, encode_prompt, encode_sample
from rayva.text.templates import get_template
from tests.export.test_hf import CONVERSATIONS, public_form
from tests.export.tiny_model import make_language, make_tokenizer
from tests.interop.checkpoints import stored
from tests.interop.test_mutations import make_lora
from tests.reference import TOKENIZER, needs

LANGUAGES: dict[str, tuple[Any, Any, bool]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, False),
    "mistral": (MistralConfig, MistralForCausalLM, False),
    "qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, True),
}


def language(name: str, rows: int) -> PreTrainedModel:
    make_config, make_model, tied = LANGUAGES[name]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return make_model(config).eval()


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_tokenizer_that_outgrew_the_embedding(name: str) -> None:
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    model = language(name, rows)
    ids = torch.tensor([[1, 5, 9, 30]])
    before = model(input_ids=ids).logits
    tokenizer.add_tokens(["<one>", "<two>", "<three>"], special_tokens=True)
    assert cover_vocabulary(model, tokenizer) == 3
    assert model.config.vocab_size == len(tokenizer) == rows + 3
    after = model(input_ids=ids).logits
    assert torch.equal(after[..., :rows], before)
    mean = before.mean(dim=-1, keepdim=True).expand(-1, -1, 3)
    torch.testing.assert_close(after[..., rows:], mean, rtol=1e-4, atol=1e-5)
    assert model(input_ids=torch.tensor([[rows + 2]])).logits.isfinite().all()
    assert cover_vocabulary(model, tokenizer) == 0


def test_a_padded_vocabulary_stays_as_it_is() -> None:
    tokenizer = make_tokenizer()
    model = language("qwen2, tied", len(tokenizer) + 37)
    before = model.get_input_embeddings().weight
    assert cover_vocabulary(model, tokenizer) == 0
    assert model.get_input_embeddings().weight is before


def sentencepiece(folder: Path, legacy: bool) -> PreTrainedTokenizerBase:
    """The golden SentencePiece vocabulary, as the original's (legacy) or the newer kind of tokenizer."""
    (folder / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": legacy,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


CHATS: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    **CONVERSATIONS,
    "an answer first": [("assistant", ("Hi",)), ("user", (IMAGE, "\nWhat?"))],
    "two answers first": [
        *(("system", ("Be brief.",)), ("assistant", ("Hi",)), ("assistant", ("Ho",))),
        *(("user", ("What?",)), ("assistant", ("x",)), ("user", (IMAGE, "\nWhat?"))),
    ],
    "a picture alone": [("user", (IMAGE,))],
    "a picture alone, answered": [("user", (IMAGE,)), ("assistant", ("x",)), ("user", ("y",))],
    "an empty question": [("user", ("a",)), ("assistant", ("x",)), ("user", ())],
    "an empty answer": [("user", (IMAGE, "\nWhat?")), ("assistant", ()), ("user", ("Sure?",))],
    "a system message with a space": [("system", (" Be brief.",)), ("user", (IMAGE, "\nWhat?"))],
    "white space": [("user", ("What? ",)), ("assistant", (" A \n",)), ("user", (" Sure?\n",))],
    "whole": [("user", (IMAGE, "\nWhat?")), ("assistant", ("A star.",))],
    "whole, a picture alone": [("user", (IMAGE,)), ("assistant", (" A star.",))],
    "whole, text alone": [("user", ("a",)), ("assistant", ("A star.",))],
    "whole, empty": [("user", (IMAGE,)), ("assistant", ())],
    "only an answer": [("assistant", ("A star.",))],
}


@needs(TOKENIZER)
@pytest.mark.parametrize("kind", ["legacy", "first", "first, chatml", "bytes"])
@pytest.mark.parametrize("name", ["plain", "v0", "v1", "llama_2", "chatml"])
def test_chat_templates_with_every_tokenizer(name: str, kind: str, tmp_path: Path) -> None:
    """Other programs encode a rendered conversation as training does, token by token."""

    def make() -> PreTrainedTokenizerBase:
        tokenizer = make_tokenizer() if kind == "bytes" else sentencepiece(tmp_path, kind == "legacy")
        if kind == "first, chatml":
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        return tokenizer

    tokenizer, other = make(), make()
    template = get_template(name, tokenizer=tokenizer)
    other.chat_template = chat_template(template, tokenizer, None)
    other.add_tokens(["<image>"], special_tokens=True)
    image = other.convert_tokens_to_ids("<image>")
    for what, conversation in CHATS.items():
        messages = [Message(role, content) for role, content in conversation]
        asks = messages[-1].role == "user"
        text = other.apply_chat_template(
            [public_form(message) for message in messages], add_generation_prompt=asks, tokenize=False
        )
        found = other(text, add_special_tokens=False).input_ids
        found = [IMAGE_TOKEN_INDEX if token == image else token for token in found]
        if asks:
            assert found == encode_prompt(messages, template, tokenizer), what
        else:
            assert found == encode_sample(messages, template, tokenizer).input_ids, what


def normalising(folder: Path, declared: str) -> PreTrainedTokenizerBase:
    """The golden vocabulary as older conversions wrote it, in a folder of Hugging Face's LLaVA."""
    spec = json.loads(AutoTokenizer.from_pretrained(TOKENIZER).backend_tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spec |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": declared}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return AutoTokenizer.from_pretrained(folder)


@needs(TOKENIZER)
@pytest.mark.parametrize("added", [(), ("<im_start>", "<im_end>")])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_an_imported_tokenizer_encodes_as_it_did_in_its_checkpoint(
    declared: str, model_type: str, added: tuple[str, ...], tmp_path: Path
) -> None:
    """transformers chooses the class by the model type beside the files, which an import changes."""
    own = normalising(tmp_path / "source", declared)
    (tmp_path / "target").mkdir()
    config = {"model_type": model_type}
    _, lacked = write_tokenizer(tmp_path / "source", tmp_path / "target", config, added, hugging_face=True)
    assert lacked == list(added)
    again = load_tokenizer(str(tmp_path / "target"))
    again.save_pretrained(tmp_path / "target")  # as training does
    for tokenizer in (again, load_tokenizer(str(tmp_path / "target"))):
        assert len(tokenizer) == len(own) + len(added)
        for text in ("USER: hi\nyou  </s> and  </s>me", " a", "\n\n1999\tcaf\u00e9", ""):
            assert tokenizer(text).input_ids == own(text).input_ids


@needs(TOKENIZER)
@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_an_original_checkpoint_keeps_the_class_of_its_language_model(
    model_type: str, tmp_path: Path
) -> None:
    """transformers would read the SentencePiece model beside `llava` without its prefix space."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    own = sentencepiece(tmp_path / "source", legacy=True)
    (tmp_path / "source/config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, _ = write_tokenizer(tmp_path / "source", tmp_path / "target", {"model_type": "llama"})
    assert tokenizer("a</s>b c").input_ids == own("a</s>b c").input_ids


@needs(TOKENIZER)
def test_a_damaged_tokenizer_is_told_by_its_folder(tmp_path: Path) -> None:
    normalising(tmp_path / "source", "LlamaTokenizerFast")
    file = tmp_path / "source/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "x"}))
    (tmp_path / "target").mkdir()
    with pytest.raises(WeightsError, match=f"{tmp_path}/source: tokenizer.json.* are no tokenizer"):
        write_tokenizer(tmp_path / "source", tmp_path / "target", {"model_type": "llama"}, hugging_face=True)


@pytest.mark.parametrize(("kind", "tied"), [("projector", False), ("projector", True), ("lora", False)])
def test_a_base_whose_tokenizer_outgrew_it(kind: str, tied: bool, tmp_path: Path) -> None:
    """An import gives it the rows that training gives it, and says so."""
    make_lora(tmp_path)
    tokenizer = make_tokenizer()
    base = make_language(len(tokenizer), tied)
    base.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one>", "<two>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "base")
    source = tmp_path / ("mm_projector.bin" if kind == "projector" else "lora")
    report = import_model(
        source, tmp_path / "model", Choices(language=tmp_path / "base", vision=tmp_path / "tower")
    )
    assert any("2 tokens more" in note for note in report.notes)
    assert cover_vocabulary(base, tokenizer) == 2
    found = stored(tmp_path / "model")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if f"language.{name}" in found:
            torch.testing.assert_close(found[f"language.{name}"], base.state_dict()[name], rtol=0, atol=1e-6)
    assert ("language.lm_head.weight" in found) != tied
    assistant = load_assistant(tmp_path / "model")
    assert len(assistant.tokenizer) == assistant.model.language.get_input_embeddings().weight.shape[0]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_larger_lora(
    root: Path, more: int, whole: tuple[str, ...], place: str, **config: Any
) -> dict[str, Tensor]:
    """`make_lora` with `more` tokens than its base, and the tables `whole` trained in full, in `place`."""
    make_lora(root)
    base = load_file(root / "base/model.safetensors")
    rows = len(base[EMBEDDING]) + more
    file = root / "lora/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": rows, **config}))
    draw = torch.Generator().manual_seed(5)
    tables = {name: torch.randn(rows, base[name].shape[1], generator=draw) for name in whole}
    stored_in = root / "lora" / place
    tensors = torch.load(stored_in, weights_only=True)
    torch.save(tensors | {f"base_model.model.{name}": t for name, t in tables.items()}, stored_in)
    return tables


def import_lora(root: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    choices = Choices(language=root / "base", vision=root / "tower")
    report = import_model(root / "lora", root / "model", choices)
    return stored(root / "model"), report.notes


@pytest.mark.parametrize("place", ["non_lora_trainables.bin", "adapter_model.bin"])
@pytest.mark.parametrize("whole", [(), (EMBEDDING,), (EMBEDDING, HEAD)])
def test_a_lora_with_more_tokens_than_its_base(whole: tuple[str, ...], place: str, tmp_path: Path) -> None:
    """Tables that were trained are taken; the others get the rows that training gave them."""
    tables = make_larger_lora(tmp_path, 3, whole, place)
    found, notes = import_lora(tmp_path)
    base = load_file(tmp_path / "base/model.safetensors")
    for name in (EMBEDDING, HEAD):
        mean = base[name].mean(dim=0).expand(3, -1)
        expected = tables.get(name, torch.cat([base[name], mean]))
        torch.testing.assert_close(found[f"language.{name}"], expected, rtol=0, atol=1e-6)
    told = " ".join(note for note in notes if "the mean row" in note)
    assert [name for name in (EMBEDDING, HEAD) if name not in told] == list(whole)
    assert load_assistant(tmp_path / "model").model.language.config.vocab_size == len(base[HEAD]) + 3


def test_modules_saved_with_the_adapter(tmp_path: Path) -> None:
    """peft's modules_to_save, in the adapter's file, go before non_lora_trainables.bin."""
    tables = make_larger_lora(tmp_path, 0, (EMBEDDING, HEAD), "adapter_model.bin")
    file = tmp_path / "lora/adapter_config.json"
    settings = json.loads(file.read_text()) | {"modules_to_save": ["embed_tokens", "lm_head"]}
    file.write_text(json.dumps(settings))
    others = tmp_path / "lora/non_lora_trainables.bin"
    same = {f"base_model.model.{n.removesuffix('.weight')}.modules_to_save.default.weight": t * 2
            for n, t in tables.items()}  # fmt: skip
    torch.save(torch.load(others, weights_only=True) | same, others)
    found, _ = import_lora(tmp_path)
    for name, table in tables.items():
        assert torch.equal(found[f"language.{name}"], table)
    file.write_text(json.dumps(settings | {"modules_to_save": ["norm_of_nothing"]}))
    with pytest.raises(
        WeightsError, match="modules_to_save names norm_of_nothing, which neither adapter_model"
    ):
        import_model(
            tmp_path / "lora",
            tmp_path / "two",
            Choices(language=tmp_path / "base", vision=tmp_path / "tower"),
        )


def test_an_adapter_of_a_grown_head(tmp_path: Path) -> None:
    """LoRA weights of the LM head have the trained model's rows, and add to what was trained in full."""
    tables = make_larger_lora(tmp_path, 3, (HEAD,), "non_lora_trainables.bin")
    file = tmp_path / "lora/adapter_model.bin"
    a, b = torch.randn(4, tables[HEAD].shape[1]), torch.randn(len(tables[HEAD]), 4)
    own = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    torch.save(torch.load(file, weights_only=True) | own, file)
    found, _ = import_lora(tmp_path)
    torch.testing.assert_close(found[f"language.{HEAD}"], tables[HEAD] + 2 * b @ a, rtol=0, atol=1e-4)


def test_tokens_around_images_have_the_ids_of_training(tmp_path: Path) -> None:
    """With mm_use_im_patch_token, the original adds `<im_patch>` before them."""
    make_larger_lora(
        tmp_path, 3, (), "adapter_model.bin", mm_use_im_start_end=True, mm_use_im_patch_token=True
    )
    before = len(make_tokenizer())
    import_lora(tmp_path)
    tokenizer = load_assistant(tmp_path / "model").tokenizer
    names = ["<im_patch>", "<im_start>", "<im_end>"]
    assert tokenizer.convert_tokens_to_ids(names) == [before, before + 1, before + 2]


def test_a_vocabulary_beyond_all_bounds_takes_no_memory(tmp_path: Path) -> None:
    make_lora(tmp_path)
    file = tmp_path / "lora/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 2**30}))
    with pytest.raises(WeightsError, match=r"weight has the shape .* describes \[1073741824, "):
        import_lora(tmp_path)
