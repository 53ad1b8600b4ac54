"""The Hugging Face export: what public tools load computes what the model computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from rayva.errors import WeightsError
from rayva.model.export_hf import export_hf
from rayva.model.export_hf_check import check_export
from rayva.model.folder import load_assistant
from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IMAGE_TOKEN_INDEX, encode_prompt, encode_sample
from rayva.text.templates import get_template
from tests.export.tiny_model import PATCH, SIDE, make_model_folder, make_tokenizer

VARIANTS = {
    "linear, v1": {"template": "v1", "projector": "linear"},
    "mlp, padded, tied, chatml": {
        "template": "chatml",
        "projector": "mlp2x_gelu",
        "aspect": "pad",
        "tied": True,
    },
    "v0": {"template": "v0"},
    "llama_2": {"template": "llama_2"},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and its export."""
    source = make_model_folder(tmp_path_factory.mktemp("export"), **request.param)
    target = source.parent / "hf"
    assert export_hf(source, target) <= 1e-4
    return source, target


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(7)
    return [
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((28, 28), (33, 61), (80, 45))
    ]


def test_greedy_answers_are_the_same(exported: tuple[Path, Path]) -> None:
    """The whole way of another program: processor, chat template, generate."""
    source, target = exported
    assistant = load_assistant(source)
    model = LlavaForConditionalGeneration.from_pretrained(target, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(target)
    for picture in pictures():
        features = assistant.encode_images([picture])
        ours = assistant.answer_batch([[Message("user", (IMAGE, "\nWhat is it?"))]], [features], 12)[0]
        conversation = [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(text=text, images=picture, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
        theirs = processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        assert theirs.startswith(ours) if assistant.template.name == "v0" else theirs == ours
        assert ours


def test_pixels_are_the_same_to_the_last_bit(exported: tuple[Path, Path]) -> None:
    source, target = exported
    tower = load_assistant(source).tower
    processor = AutoProcessor.from_pretrained(target).image_processor
    for picture in pictures():
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(theirs, tower.preprocess([picture]))


def test_names_on_disk_are_those_of_public_checkpoints(exported: tuple[Path, Path]) -> None:
    _, target = exported
    index = json.loads((target / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    assert {
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
    } <= names
    prefixes = ("vision_tower.vision_model.", "language_model.", "multi_modal_projector.")
    assert all(name.startswith(prefixes) for name in names)
    stored = {name for file in set(index["weight_map"].values()) for name in load_file(target / file)}
    assert stored == names


def test_linear_projector_is_exact(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path, projector="linear")
    export_hf(source, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model-00002-of-00002.safetensors")
    own = load_file(source / "projector.safetensors")
    width = own["weight"].shape[0]
    assert torch.equal(tensors["multi_modal_projector.linear_1.weight"], own["weight"])
    assert torch.equal(tensors["multi_modal_projector.linear_1.bias"], own["bias"])
    assert torch.equal(tensors["multi_modal_projector.linear_2.weight"], torch.eye(width))
    assert not tensors["multi_modal_projector.linear_2.bias"].any()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["projector_hidden_act"] == "linear"


def test_vocabulary(exported: tuple[Path, Path]) -> None:
    source, target = exported
    config = json.loads((target / "config.json").read_text())
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source / "language", target))
    assert config["text_config"]["vocab_size"] % 64 == 0
    assert config["text_config"]["vocab_size"] >= len(after) > len(before)
    assert after.convert_tokens_to_ids("<image>") == config["image_token_index"] == len(before)
    processor = json.loads((target / "processor_config.json").read_text())
    assert processor["patch_size"] == PATCH
    assert processor["vision_feature_select_strategy"] == "default"
    assert processor["num_additional_image_tokens"] == 1
    assert config["image_seq_length"] == (SIDE // PATCH) ** 2


def test_added_tokens_are_never_the_likeliest(exported: tuple[Path, Path]) -> None:
    source, target = exported
    known = json.loads((source / "language" / "config.json").read_text())["vocab_size"]
    head = load_file(target / "model-00001-of-00002.safetensors")["language_model.lm_head.weight"]
    hidden = torch.randn(2000, head.shape[1], generator=torch.Generator().manual_seed(0))
    assert (hidden @ head.T).argmax(dim=1).max() < known < head.shape[0]


def test_no_path_of_this_machine_is_written(exported: tuple[Path, Path]) -> None:
    source, target = exported
    for file in target.glob("*.json"):
        assert str(source.parent) not in file.read_text(), file.name


@pytest.mark.parametrize(
    "name",
    [
        "language_model.lm_head.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ],
)
def test_a_changed_weight_is_refused_with_the_number(
    exported: tuple[Path, Path], name: str, tmp_path: Path
) -> None:
    source, target = exported
    damaged = tmp_path / "hf"
    shutil.copytree(target, damaged)
    file = damaged / json.loads((target / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"differ .* by \d\.\d+e[-+]\d+ \(allowed: 1e-03\)"):
        check_export(source, damaged)


def test_a_lost_weight_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = exported
    damaged = tmp_path / "hf"
    shutil.copytree(target, damaged)
    file = damaged / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["multi_modal_projector.linear_9.bias"] = tensors.pop("multi_modal_projector.linear_1.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    place = index["weight_map"].pop("multi_modal_projector.linear_1.bias")
    index["weight_map"]["multi_modal_projector.linear_9.bias"] = place
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"linear_1\.bias"):
        check_export(source, damaged)


def test_a_refused_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model_folder(tmp_path)
    monkeypatch.setattr("rayva.model.export_hf_check.TOLERANCE", -1.0)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(WeightsError, match="logits differ"):
        export_hf(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_existing_target_is_kept(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("mine")
    with pytest.raises(WeightsError, match="exists already"):
        export_hf(source, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


CONVERSATIONS = {
    "one question": [("user", (IMAGE, "\nWhat is it?"))],
    "text only": [("user", ("What is it?",))],
    "system": [("system", ("Be brief.",)), ("user", (IMAGE, "\nWhat?"))],
    "no system": [("system", ("",)), ("user", (IMAGE, "\nWhat?"))],
    "two pictures": [("user", (IMAGE, "\n", IMAGE, "\nWhich is larger?"))],
    "several turns": [
        ("user", (IMAGE, "\nWhat?")),
        ("assistant", ("A star.",)),
        ("user", ("Where?",)),
        ("assistant", ("Here.",)),
        ("user", ("Sure?",)),
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", ["v0", "v1", "llama_2", "chatml", "tokenizer"])
def test_the_chat_template_writes_what_ours_writes(
    name: str, conversation: list[tuple[str, tuple[object, ...]]]
) -> None:
    """Token by token, for the generation form and for whole conversations."""
    from rayva.model.export_hf_chat import chat_template

    tokenizer = make_tokenizer(chatml=name in ("chatml", "tokenizer"))
    if name == "tokenizer":
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    template = get_template(name, tokenizer=tokenizer)
    messages = [Message(role, content) for role, content in conversation]
    expected = [encode_prompt(messages, template, tokenizer)]
    answered = [*messages, Message("assistant", ("Yes.",))]
    expected.append(encode_sample(answered, template, tokenizer).input_ids)
    other = make_tokenizer(chatml=name in ("chatml", "tokenizer"))
    other.chat_template = chat_template(template, tokenizer, None)
    other.add_tokens(["<image>"], special_tokens=True)
    public = [public_form(message) for message in messages]
    image = other.convert_tokens_to_ids("<image>")
    for conversation_ids, ask, extra in zip(
        expected, (True, False), ([], [{"role": "assistant", "content": "Yes."}]), strict=True
    ):
        text = other.apply_chat_template([*public, *extra], add_generation_prompt=ask, tokenize=False)
        found = other(text, add_special_tokens=False).input_ids
        assert [IMAGE_TOKEN_INDEX if token == image else token for token in found] == conversation_ids


def public_form(message: Message) -> dict[str, object]:
    """The message as the processors of Hugging Face take it."""
    images = [{"type": "image"}] * message.num_images
    text = message.text.lstrip("\n")
    return {"role": message.role, "content": [*images, {"type": "text", "text": text}]}
