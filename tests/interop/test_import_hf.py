"""Import of Hugging Face LLaVA folders: public checkpoints, those of transformers 5, and our own exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rayva.errors import WeightsError
from rayva.model.checkpoint import open_checkpoint
from rayva.model.export_hf import export_hf
from rayva.model.export_hf_chat import chat_template
from rayva.model.export_hf_check import check_export
from rayva.model.folder import ConversationSettings, ModelSettings, load_assistant
from rayva.model.import_chat import of_chat_template
from rayva.model.import_model import import_model
from rayva.model.import_parts import Choices
from rayva.text.templates import get_template
from tests.export.test_hf import pictures
from tests.export.tiny_model import HIDDEN, PATCH, SIDE, WIDTH, make_model_folder, make_tokenizer
from tests.interop.checkpoints import same, stored

pytestmark = pytest.mark.slow  # many export a model and load it in transformers

PUBLIC_STYLE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""How the public checkpoints write a conversation down: v1 without a system message."""

TEXT: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
}


def make_hf(folder: Path, text: str = "llama", vision: str = "clip", linear: bool = False) -> Path:
    """A random LlavaForConditionalGeneration with its processor, as transformers 5 saves it."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    make, more = TEXT[text]
    own = make(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    tower = (CLIPVisionConfig if vision == "clip" else SiglipVisionConfig)(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=tower, text_config=own, image_token_index=len(tokenizer) - 1,
        image_seq_length=(SIDE // PATCH) ** 2, projector_hidden_act="linear" if linear else "gelu",
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        tie_word_embeddings=bool(more.get("tie_word_embeddings")),
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    if linear:
        second = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        torch.nn.init.zeros_(second.bias)
    model.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    images = (
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        if vision == "clip"
        else SiglipImageProcessorPil(size=square)
    )
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(vision == "clip"), chat_template=PUBLIC_STYLE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("text", TEXT)
def test_hugging_face_folders(text: str, vision: str, tmp_path: Path) -> None:
    """Our code on the imported folder computes what transformers computes on the source."""
    source = make_hf(tmp_path / "hf", text, vision)
    report = import_model(source, tmp_path / "model")
    assert report.kind == "hf"
    assert check_export(tmp_path / "model", source) <= 1e-4
    export_hf(tmp_path / "model", tmp_path / "again")
    first, second = (all_tensors(folder) for folder in (source, tmp_path / "again"))
    for name, tensor in first.items():
        assert torch.equal(second[public_name(name)][: len(tensor)], tensor), name


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in open_checkpoint(folder).items()}


def public_name(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


@pytest.mark.parametrize("scheme", ["public", "in memory"])
def test_every_scheme_of_names(scheme: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    import_model(source, tmp_path / "model")
    tensors = all_tensors(source)
    if scheme == "public":
        tensors = {public_name(name): tensor for name, tensor in tensors.items()}
    else:
        model = LlavaForConditionalGeneration.from_pretrained(source)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_model(source, tmp_path / "other")
    assert same(stored(tmp_path / "model"), stored(tmp_path / "other"))


def test_a_linear_projector_comes_back_as_one(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", linear=True)
    assert import_model(source, tmp_path / "model").settings.projector == "linear"
    weight = load_file(tmp_path / "model/projector.safetensors")["weight"]
    assert torch.equal(weight, all_tensors(source)["multi_modal_projector.linear_1.weight"])
    assert check_export(tmp_path / "model", source) <= 1e-4
    tensors = all_tensors(source)
    tensors["multi_modal_projector.linear_2.weight"][0, 1] = 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"linear_2\.weight.*identity"):
        import_model(source, tmp_path / "other")


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_our_own_export_comes_back_bit_by_bit(projector: Any, aspect: Any, tmp_path: Path) -> None:
    source = make_model_folder(tmp_path, template="v0", projector=projector, aspect=aspect)
    export_hf(source, tmp_path / "hf")
    report = import_model(tmp_path / "hf", tmp_path / "again")
    assert report.settings.vision.aspect == aspect
    assert report.settings.projector == projector
    assert report.settings.conversation == ModelSettings.read(source).conversation
    before, after = (load_assistant(folder) for folder in (source, tmp_path / "again"))
    for picture in pictures():
        assert torch.equal(before.encode_images([picture])[0], after.encode_images([picture])[0])
    export_hf(tmp_path / "again", tmp_path / "hf again")
    first, second = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "hf again")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("system", [None, "", "Answer in one word."])
@pytest.mark.parametrize("template", ["v1", "v0", "llama_2", "chatml"])
def test_the_template_is_found_in_the_chat_template(
    template: str, system: str | None, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chatml=template == "chatml")
    built = get_template(template, tokenizer=tokenizer, system=system)
    tokenizer.chat_template = chat_template(built, tokenizer, system)
    found, why = of_chat_template(tokenizer, tmp_path)
    assert found == ConversationSettings(template, system), why


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (PUBLIC_STYLE, ("v1", "")),
        ("{{ messages[0]['content'][1]['text'] }}", ("v1", None)),
        ("{{ undefined_thing() }}", ("v1", None)),
        ("{% for", ("v1", None)),
        (None, ("v1", None)),
    ],
)
def test_chat_templates_of_others(
    written: str | None, expected: tuple[str, str | None], tmp_path: Path
) -> None:
    source = make_hf(tmp_path / "hf")
    (source / "chat_template.jinja").unlink()
    if written is not None:
        (source / "chat_template.jinja").write_text(written)
    report = import_model(source, tmp_path / "model")
    found = report.settings.conversation
    assert (found.template, found.system) == expected
    assert ("assumed" in report.notes[-1]) == (written != PUBLIC_STYLE)
    chosen = import_model(source, tmp_path / "chosen", Choices(template="llama_2", system="Hm."))
    assert (chosen.settings.conversation.template, chosen.settings.conversation.system) == ("llama_2", "Hm.")
