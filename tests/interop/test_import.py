"""Import: every layout becomes a model folder that computes what the checkpoint computes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from rayva.cli import main
from rayva.errors import WeightsError
from rayva.model.export_hf import export_hf
from rayva.model.export_hf_check import check_export
from rayva.model.export_llava import export_llava, export_projector
from rayva.model.folder import ModelSettings, load_assistant
from rayva.model.import_model import import_model, recognise
from rayva.model.import_parts import Choices
from rayva.text.conversation import IMAGE, Message
from rayva.text.encode import IMAGE_TOKEN_INDEX, encode_prompt
from tests.export.test_hf import pictures
from tests.export.tiny_model import (
    WIDTH,
    make_language,
    make_model_folder,
    make_tokenizer,
)
from tests.interop.checkpoints import (
    Layout,
    make_original,
    original_config,
    projector_tensors,
    same,
    save_weights,
    stored,
    write_config,
)
from tests.interop.test_mutations import make_lora, make_stage_one
from tests.reference import NUMERICS, needs

pytestmark = pytest.mark.slow  # many export a model and load it in transformers


# --- the original's own outputs ---


@needs(NUMERICS)
@pytest.mark.parametrize("way", ["folder", "projector", "projector folder", "projector on a LLaVA"])
def test_the_originals_logits(way: str, tmp_path: Path) -> None:
    """The command, export, and transformers: logits within 1e-4 of the original code's."""
    arguments = [str(NUMERICS / "llava_checkpoint")]
    if way == "projector folder":
        (tmp_path / "stage1").mkdir()
        shutil.copy(NUMERICS / "mm_projector.bin", tmp_path / "stage1")
    if way == "projector on a LLaVA":  # whose config.json names the tower
        arguments = [str(NUMERICS / "mm_projector.bin"), "--language", str(NUMERICS / "llava_checkpoint")]
    elif way != "folder":
        source = NUMERICS / "mm_projector.bin" if way == "projector" else tmp_path / "stage1"
        base = ["--language", str(golden_base(tmp_path)), "--vision", str(NUMERICS / "tiny_clip")]
        arguments = [str(source), *base]
    assert main(["import", *arguments[:1], str(tmp_path / "model"), *arguments[1:]]) == 0
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "hf")]) == 0
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tensors = load_file(NUMERICS / "tensors.safetensors")
    for name, case in json.loads((NUMERICS / "cases.json").read_text()).items():
        for found, expected in golden_rows(model, tensors, name, case["images"]):
            torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-4, rtol=0)


def golden_base(folder: Path) -> Path:
    """The language model of the original's checkpoint, as a folder of its own."""
    source, base = NUMERICS / "llava_checkpoint", folder / "base"
    base.mkdir()
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "special")):
            shutil.copy(file, base)
    weights = load_file(source / "model.safetensors")
    own = {n: t for n, t in weights.items() if "mm_projector" not in n and "vision_tower" not in n}
    save_file(own, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("mm_")}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return base


@torch.inference_mode()
def golden_rows(
    model: Any, tensors: dict[str, Tensor], name: str, images: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Logits [T, V] of each row, and the original's."""
    pairs, remaining = [], list(images)
    places = tensors["clip_hidden_minus2_patch"].shape[1]
    for row, ids in enumerate(tensors[f"{name}.input_ids"]):
        expanded: list[int] = []
        count = 0
        for token in ids[tensors[f"{name}.attention_mask"][row].bool()].tolist():
            image = token == IMAGE_TOKEN_INDEX
            count += image
            expanded += [model.config.image_token_index] * places if image else [token]
        own, remaining = remaining[:count], remaining[count:]
        logits = model(input_ids=torch.tensor([expanded]), pixel_values=tensors["pixel_values"][own]).logits
        valid = tensors[f"{name}.expanded_attention_mask"][row].bool()
        pairs.append((logits[0], tensors[f"{name}.logits"][row][valid]))
    return pairs


@needs(NUMERICS)
def test_the_originals_weights_survive_there_and_back(tmp_path: Path) -> None:
    import_model(NUMERICS / "llava_checkpoint", tmp_path / "first")
    export_llava(tmp_path / "first", tmp_path / "llava")
    import_model(tmp_path / "llava", tmp_path / "second")
    assert same(stored(tmp_path / "first"), stored(tmp_path / "second"))
    settings = [ModelSettings.read(tmp_path / name) for name in ("first", "second")]
    assert settings[0] == settings[1]


# --- layouts of the original code ---


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@pytest.mark.parametrize("stores_tower", [True, False])
def test_every_layout_is_imported_bit_by_bit(
    kind: Any, layout: Layout, stores_tower: bool, tmp_path: Path
) -> None:
    # A name that would mislead whoever judged by it.
    folder, tensors = make_original(tmp_path, kind=kind, layout=layout, stores_tower=stores_tower)
    folder = folder.rename(tmp_path / "lora-projector-hf-v0")
    report = import_model(folder, tmp_path / "model")
    assert report.kind == "original"
    found = stored(tmp_path / "model")
    for name, tensor in tensors.items():
        if name.startswith("model.mm_projector."):
            own = f"projector.{name.removeprefix('model.mm_projector.')}"
        elif "vision_tower" in name:
            own = f"vision.{name.removeprefix('model.vision_tower.vision_tower.')}"
        else:
            own = f"language.{name}"
        assert torch.equal(found.pop(own), tensor), name
    assert all(name.startswith("vision.") for name in found)
    assert bool(found) != stores_tower
    assert report.settings.vision.aspect == "pad"
    assert report.settings.projector == kind
    if layout == "bin":
        assert check_and_export(tmp_path) <= 1e-4
    export_llava(tmp_path / "model", tmp_path / "llava")
    import_model(tmp_path / "llava", tmp_path / "again")
    assert same(stored(tmp_path / "model"), stored(tmp_path / "again"))


def check_and_export(folder: Path) -> float:
    """Largest difference of a logit between `folder`/model and its export."""
    return export_hf(folder / "model", folder / "hf")


def test_precision_is_kept(tmp_path: Path) -> None:
    folder, tensors = make_original(tmp_path)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_weights(folder, half, "bin")
    import_model(folder, tmp_path / "model")
    assert {tensor.dtype for tensor in stored(tmp_path / "model").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/language/config.json").read_text())["dtype"] == "bfloat16"
    assert check_and_export(tmp_path) <= 1e-4


def test_archives_from_before_torch_1_6(tmp_path: Path) -> None:
    folder, tensors = make_original(tmp_path)
    plain = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.save(plain, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    import_model(folder, tmp_path / "model")
    assert torch.equal(stored(tmp_path / "model")["language.lm_head.weight"], tensors["lm_head.weight"])


def test_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    folder, tensors = make_original(tmp_path)
    older = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    save_weights(folder, tensors | older)
    import_model(folder, tmp_path / "model")
    assert not any("inv_freq" in name or "position_ids" in name for name in stored(tmp_path / "model"))


def test_a_projector_of_our_own_export(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path, projector="mlp2x_gelu", aspect="pad")
    export_projector(source, tmp_path / "projector")
    choices = Choices(language=source / "language", vision=source / "vision")
    report = import_model(tmp_path / "projector", tmp_path / "again", choices)
    assert report.kind == "projector"
    assert report.settings.vision.aspect == "pad"  # from the config.json beside the projector
    assert check_export(tmp_path / "again", export_of(source, tmp_path / "hf")) <= 1e-4


def export_of(source: Path, target: Path) -> Path:
    export_hf(source, target)
    return target


def test_a_base_and_a_projector_in_one_folder(tmp_path: Path) -> None:
    make_stage_one(tmp_path)
    shutil.copy(tmp_path / "mm_projector.bin", tmp_path / "base")
    assert recognise(tmp_path / "base") == "projector"
    import_model(tmp_path / "base", tmp_path / "model", Choices(vision=tmp_path / "tower"))
    assert check_and_export(tmp_path) <= 1e-4


@pytest.mark.parametrize("safe", [True, False])
def test_lora_is_merged(safe: bool, tmp_path: Path) -> None:
    make_lora(tmp_path)
    adapter = torch.load(tmp_path / "lora/adapter_model.bin", weights_only=True)
    if safe:
        save_file(adapter, tmp_path / "lora/adapter_model.safetensors")
        (tmp_path / "lora/adapter_model.bin").unlink()
    choices = Choices(language=tmp_path / "base", vision=tmp_path / "tower")
    report = import_model(tmp_path / "lora", tmp_path / "model", choices)
    assert report.kind == "lora"
    found = stored(tmp_path / "model")
    changed = 0
    for name, weight in load_file(tmp_path / "base/model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            # Equation 3 of the LoRA paper with alpha 8 and r 4.
            weight = weight + 2 * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            changed += 1
        torch.testing.assert_close(found[f"language.{name}"], weight, rtol=0, atol=1e-6)
    assert changed == 4
    for name, tensor in projector_tensors("linear").items():
        assert torch.equal(found[f"projector.{name.removeprefix('model.mm_projector.')}"], tensor)


# --- LLaVA v0 with tokens around images ---


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A checkpoint of LLaVA v0: `[PAD]`, `<im_start>` and `<im_end>` behind the vocabulary."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[PAD]", "<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    folder, _ = make_original(
        tmp_path,
        tokenizer=tokenizer,
        mm_use_im_start_end=True,
        mm_use_im_patch_token=True,
        model_type="llava",
    )
    return folder


def test_images_between_their_tokens(marked: Path, tmp_path: Path) -> None:
    report = import_model(marked, tmp_path / "model")
    assert report.settings.conversation.template == "v0"
    assistant = load_assistant(tmp_path / "model")
    ids = encode_prompt([Message("user", (IMAGE, "\nWhat?"))], assistant.template, assistant.tokenizer)
    place = ids.index(IMAGE_TOKEN_INDEX)
    start, end = assistant.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert (ids[place - 1], ids[place + 1]) == (start, end)
    assert ids.count(start) == ids.count(end) == 1
    assert check_and_export(tmp_path) <= 1e-4
    export_llava(tmp_path / "model", tmp_path / "llava")
    assert import_model(tmp_path / "llava", tmp_path / "again").settings == report.settings
    assert import_model(tmp_path / "hf", tmp_path / "from hf").settings.conversation.image_markers == (
        "<im_start>",
        "<im_end>",
    )


@pytest.mark.parametrize("whole", [True, False])
def test_stage_1_trained_those_tokens(whole: bool, tmp_path: Path) -> None:
    """The file holds the embeddings of the two tokens, alone or behind all others."""
    make_stage_one(tmp_path)
    rows = load_file(tmp_path / "base/model.safetensors")["model.embed_tokens.weight"]
    new = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    embedding = torch.cat([rows, new]) if whole else new
    torch.save(
        projector_tensors("linear") | {"model.embed_tokens.weight": embedding}, tmp_path / "mm_projector.bin"
    )
    choices = Choices(language=tmp_path / "base", vision=tmp_path / "tower", template="v0")
    import_model(tmp_path / "mm_projector.bin", tmp_path / "model", choices)
    table = stored(tmp_path / "model")["language.model.embed_tokens.weight"]
    assert torch.equal(table, torch.cat([rows, new]))
    assistant = load_assistant(tmp_path / "model")
    assert assistant.tokenizer.convert_tokens_to_ids("<im_end>") == len(rows) + 1
    assert check_and_export(tmp_path) <= 1e-4


@pytest.mark.parametrize("table", ["two", "cut", "uncut", "known"])
@pytest.mark.parametrize("tied", [False, True])
def test_those_tokens_go_into_spare_rows(table: str, tied: bool, tmp_path: Path) -> None:
    """Bases are padded: the trained rows are those that the model answers with, in the original's layouts."""
    make_stage_one(tmp_path)
    tokenizer = make_tokenizer()
    tokens = len(tokenizer)
    language = make_language(tokens + 7, tied)
    language.save_pretrained(tmp_path / "base")
    if table == "known":  # a base whose tokenizer has them
        tokenizer.add_tokens(["<im_start>", "<im_end>", "<more>"], special_tokens=True)
        tokenizer.save_pretrained(tmp_path / "base")
    rows = language.get_input_embeddings().weight.detach().clone()
    new = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    uncut = torch.cat([rows[:tokens], new, rows[tokens + 2 :]])
    embedding = {"two": new, "cut": uncut[: tokens + 2], "uncut": uncut, "known": uncut[: tokens + 3]}[table]
    torch.save(
        projector_tensors("linear") | {"model.embed_tokens.weight": embedding}, tmp_path / "mm_projector.bin"
    )
    choices = Choices(language=tmp_path / "base", vision=tmp_path / "tower", template="v0")
    import_model(tmp_path / "mm_projector.bin", tmp_path / "model", choices)
    assistant = load_assistant(tmp_path / "model")
    ids = assistant.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert ids == [tokens, tokens + 1]

    # What the original code makes of the base.
    with torch.no_grad():
        if not tied and table != "known":
            head = language.lm_head.weight
            head[tokens : tokens + 2] = head[:tokens].mean(dim=0)
        language.get_input_embeddings().weight[tokens : tokens + 2] = new
    inputs = torch.tensor([[1, 20, ids[0], 30, ids[1], 40]])
    with torch.inference_mode():
        expected = language(input_ids=inputs).logits
        found = assistant.model.language(input_ids=inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if table == "two":
        assert check_and_export(tmp_path) <= 1e-4


# --- what is refused ---


def test_what_cannot_be_imported_is_told(tmp_path: Path) -> None:
    folder, _ = make_original(tmp_path)
    language = make_language(len(make_tokenizer()))

    def refused(match: str, source: Path = folder, **choices: Any) -> None:
        with pytest.raises(WeightsError, match=match):
            import_model(source, tmp_path / "out", Choices(**choices))
        assert not (tmp_path / "out").exists()

    refused("no checkpoint", tmp_path / "nowhere")
    refused(r"Rayva model folder already", make_model_folder(tmp_path / "own"))
    refused(r"config\.json", tmp_path / "tower")  # a tower alone
    language.save_pretrained(tmp_path / "plain")
    refused("without a projector", tmp_path / "plain")
    refused("--language .* of no use", language=tmp_path / "plain")
    for changes, match in {
        "mpt": ({"model_type": "llava_mpt"}, "llava_mpt is none of"),
        "next": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type.*LLaVA-NeXT"),
        "anyres": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        "class token": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        "projector": ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu', but"),
        "tower": ({"mm_vision_tower": "../nowhere"}, "mm_vision_tower '../nowhere' is no folder"),
        "long": ({"mm_vision_tower": "x" * 5000}, "mm_vision_tower 'x.* is no folder"),
        "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
        "softcap": (
            {"model_type": "llava_llama", "final_logit_softcapping": 30.0},
            "final_logit_softcapping",
        ),
    }.values():
        write_config(folder, original_config(language, "linear", **changes))
        refused(match)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation": "somebody/kernel", "attn_implementation": "somebody/kernel"},
    ],
)
def test_config_keys_that_name_code_are_left_out(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = make_original(tmp_path, **changes)
    tower = json.loads((tmp_path / "tower/config.json").read_text())
    (tmp_path / "tower/config.json").write_text(json.dumps(tower | changes))
    import_model(folder, tmp_path / "model")
    for part in ("language", "vision"):
        text = (tmp_path / "model" / part / "config.json").read_text()
        assert "evil" not in text
        assert "somebody" not in text


def test_parts_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    make_stage_one(tmp_path)
    file = tmp_path / "mm_projector.bin"
    with pytest.raises(WeightsError, match="--language"):
        import_model(file, tmp_path / "out", Choices(vision=tmp_path / "tower"))
    with pytest.raises(WeightsError, match="--vision"):
        import_model(file, tmp_path / "out", Choices(language=tmp_path / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    with pytest.raises(WeightsError, match="--tokenizer"):
        import_model(file, tmp_path / "out", Choices(language=tmp_path / "base", vision=tmp_path / "tower"))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    choices = Choices(tmp_path / "base", tmp_path / "tower", tmp_path / "tokenizer")
    import_model(file, tmp_path / "model", choices)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(WeightsError, match=r"vocab_size is \d+, but the tokenizer has \d+ tokens"):
        import_model(file, tmp_path / "out", choices)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make_original(tmp_path)
    assert main(["import", str(folder), str(tmp_path / "out"), "--template", "llama_2"]) == 0
    told = capsys.readouterr().out
    assert "original LLaVA checkpoint" in told
    assert "llama_2" in told
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["import", str(folder), str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["import", "--help"])
    assert "mm_projector.bin" in capsys.readouterr().out


def test_the_endpoints_loader_and_the_processor_agree(tmp_path: Path) -> None:
    """An imported folder answers as transformers answers on its export."""
    folder, _ = make_original(tmp_path, kind="mlp2x_gelu")
    import_model(folder, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "hf")
    assistant = load_assistant(tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    for picture in pictures():
        features = assistant.encode_images([picture])
        ours = assistant.answer_batch([[Message("user", (IMAGE, "\nWhat is it?"))]], [features], 8)[0]
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=picture, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip() == ours


def test_a_killed_import_leaves_no_half_written_folder(tmp_path: Path) -> None:
    """kill -9 while the weights are being written."""
    make_stage_one(tmp_path)
    base = load_file(tmp_path / "base/model.safetensors")
    rows = 300_000  # about 115 MB: long enough to be hit
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = torch.zeros(rows, WIDTH)
    save_file(base, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"vocab_size": rows}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    arguments = ["import", str(tmp_path / "mm_projector.bin"), str(out), "--language", str(tmp_path / "base")]
    arguments += ["--vision", str(tmp_path / "tower")]
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", "import sys; from rayva.cli import main; sys.exit(main(sys.argv[1:]))"]
    for _ in range(5):  # on a busy machine an import may end before this process gets to kill it
        process = subprocess.Popen([*command, *arguments], env=os.environ | {"PYTHONPATH": paths})
        while process.poll() is None and not list(tmp_path.glob("place/.out-*/language/config.json")):
            time.sleep(0.001)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
        shutil.rmtree(out)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert main(arguments) == 0
    assert stored(out)["language.lm_head.weight"].shape == (rows, WIDTH)
