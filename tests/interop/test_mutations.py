"""Damaged and hostile checkpoints: each is refused by name, runs nothing, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayva.errors import WeightsError
from rayva.model.export_hf import export_hf
from rayva.model.import_model import import_model
from rayva.model.import_parts import Choices
from tests.export.tiny_model import make_language, make_model_folder, make_tokenizer
from tests.interop.checkpoints import (
    make_clip,
    make_original,
    original_config,
    projector_tensors,
    write_config,
)

MUTATIONS = 240
CANARY = "RAYVA_TEST_CANARY"


class Harmful:
    """Unpickled, it calls something that leaves a trace."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def harmful(rng: random.Random, trace: Path) -> Harmful:
    code = f"open({str(trace)!r}, 'w').write('was here')"
    return rng.choice(
        [
            Harmful(exec, code),
            Harmful(eval, code),
            Harmful(os.system, f"touch {trace}"),
            Harmful(Path.write_text, trace, "was here"),
            Harmful(os.putenv, CANARY, str(trace)),
            Harmful(__import__, "antigravity"),
        ]
    )


@dataclass(frozen=True)
class Case:
    """A sound checkpoint: what `import_model` is given, relative to a folder that is copied."""

    name: str
    source: str
    choices: dict[str, str]
    weights: tuple[str, ...]
    configs: dict[str, tuple[str, ...]]
    index: str | None = None


CASES = (
    Case(
        "whole bin", "checkpoint", {}, ("checkpoint/pytorch_model.bin",),
        {
            "checkpoint/config.json": (
                "hidden_size", "num_hidden_layers", "vocab_size", "mm_vision_select_layer",
                "mm_projector_type", "image_aspect_ratio", "mm_vision_tower", "model_type",
                "num_attention_heads", "intermediate_size",
            ),
        },
    ),
    Case(
        "sharded bin", "checkpoint", {},
        ("checkpoint/pytorch_model-00001-of-00002.bin", "checkpoint/pytorch_model-00002-of-00002.bin"),
        {
            "tower/config.json": (
                "hidden_size", "num_hidden_layers", "image_size", "patch_size", "hidden_act",
            ),
            "tower/preprocessor_config.json": ("size", "crop_size", "image_mean", "rescale_factor"),
        },
        "checkpoint/pytorch_model.bin.index.json",
    ),
    Case(
        "sharded safetensors", "checkpoint", {},
        (
            "checkpoint/model-00001-of-00002.safetensors", "checkpoint/model-00002-of-00002.safetensors",
            "tower/model.safetensors",
        ),
        {"checkpoint/tokenizer.json": (), "checkpoint/tokenizer_config.json": ()},
        "checkpoint/model.safetensors.index.json",
    ),
    Case(
        "hf", "checkpoint", {},
        ("checkpoint/model-00001-of-00002.safetensors", "checkpoint/model-00002-of-00002.safetensors"),
        {
            "checkpoint/config.json": (
                "text_config", "vision_config", "vision_feature_layer", "projector_hidden_act",
                "vision_feature_select_strategy", "model_type",
            ),
            "checkpoint/processor_config.json": ("image_processor",),
        },
        "checkpoint/model.safetensors.index.json",
    ),
    Case(
        "lora", "lora", {"language": "base", "vision": "tower"},
        ("lora/adapter_model.bin", "lora/non_lora_trainables.bin", "base/model.safetensors"),
        {"lora/adapter_config.json": ("r", "lora_alpha", "peft_type", "bias")},
    ),
    Case(
        "projector", "mm_projector.bin", {"language": "base", "vision": "tower"},
        ("mm_projector.bin", "tower/model.safetensors"),
        {"base/config.json": ("hidden_size", "vocab_size")},
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each case, all of which can be imported."""
    roots = {case.name: tmp_path_factory.mktemp("sound") for case in CASES}
    make_original(roots["whole bin"], kind="mlp2x_gelu")
    make_original(roots["sharded bin"], layout="sharded bin")
    make_original(roots["sharded safetensors"], layout="sharded safetensors", stores_tower=False)
    export_hf(make_model_folder(roots["hf"], projector="mlp2x_gelu"), roots["hf"] / "checkpoint")
    for name in ("model", "tower"):
        shutil.rmtree(roots["hf"] / name)
    make_lora(roots["lora"])
    make_stage_one(roots["projector"])
    for case in CASES:
        import_case(case, roots[case.name], roots[case.name] / "out")
        shutil.rmtree(roots[case.name] / "out")
    return roots


def make_stage_one(root: Path) -> None:
    """mm_projector.bin, base, tower."""
    tokenizer = make_tokenizer()
    make_language(len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    make_clip(root / "tower")
    torch.save(projector_tensors("linear"), root / "mm_projector.bin")


def make_lora(root: Path) -> None:
    """lora (the adapter's folder), base, tower."""
    make_stage_one(root)
    language = make_language(len(make_tokenizer()))
    write_config(root / "lora", original_config(language, "linear"))
    draw = torch.Generator().manual_seed(0)
    adapter = {}
    for name, weight in language.state_dict().items():
        if "q_proj" in name or "down_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=draw)
            adapter[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=draw) * 0.1
    torch.save(adapter, root / "lora" / "adapter_model.bin")
    others = {f"base_model.model.{name}": t for name, t in projector_tensors("linear").items()}
    torch.save(others, root / "lora" / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(settings))


def import_case(case: Case, root: Path, out: Path) -> None:
    choices = Choices(**{name: root / folder for name, folder in case.choices.items()})
    import_model(root / case.source, out, choices)


def read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return dict(torch.load(file, weights_only=True))


def write(file: Path, tensors: dict[str, Any]) -> None:
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


# --- mutations of a weight file: each returns the key at fault, or None ---


def truncated(file: Path, rng: random.Random, trace: Path) -> str | None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])
    return None


def noise(file: Path, rng: random.Random, trace: Path) -> str | None:
    file.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 8, 100, 5000])))
    return None


def damaged_header(file: Path, rng: random.Random, trace: Path) -> str | None:
    data = bytearray(file.read_bytes())
    if file.suffix == ".safetensors":
        data[:8] = struct.pack("<Q", rng.choice([0, 3, 2**40, 2**63, len(data) * 2]))
    else:
        data[-22:] = rng.randbytes(22)
    file.write_bytes(data)
    return None


def missing_key(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(sorted(tensors))
    del tensors[key]
    write(file, tensors)
    return key


def extra_key(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(
        ["model.layers.9.mlp.up_proj.weight", "surprise", "", "model.mm_projector.7.weight", "\u2028"]
    )
    write(file, tensors | {key: torch.zeros(3)})
    return key


def wrong_shape(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(sorted(tensors))
    change = rng.choice(
        [lambda t: t[:-1], lambda t: t[None], lambda t: t.flatten()[:-1], lambda t: t[:0], lambda t: t.sum()]
    )
    tensors[key] = change(tensors[key]).contiguous()
    write(file, tensors)
    return key


def wrong_dtype(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(sorted(tensors))
    kinds = [torch.int64, torch.int8, torch.float64, torch.bool, torch.uint8]
    tensors[key] = tensors[key].to(rng.choice(kinds))
    write(file, tensors)
    return key


def not_finite(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(sorted(tensors))
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = rng.choice([float("nan"), float("inf")])
    write(file, tensors)
    return key


def code_as_value(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors: dict[str, Any] = dict(read(file))
    tensors[rng.choice(sorted(tensors))] = harmful(rng, trace)
    torch.save(tensors, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return None


def code_as_file(file: Path, rng: random.Random, trace: Path) -> str | None:
    file.write_bytes(pickle.dumps(harmful(rng, trace), protocol=rng.choice([0, 2, 4])))
    return None


def code_in_archive(file: Path, rng: random.Random, trace: Path) -> str | None:
    """A torch archive whose pickle is somebody else's."""
    buffer = io.BytesIO()
    torch.save(read(file), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = pickle.dumps({"x": harmful(rng, trace)}, protocol=2)
            new.writestr(entry.filename, data)
    return None


def no_tensors(file: Path, rng: random.Random, trace: Path) -> str | None:
    key = rng.choice(["model.layers.0.mlp.up_proj.weight", "epoch"])
    found = rng.choice(
        [7, None, [1.0], {"nested": torch.zeros(2)}, "text", torch.nn.Parameter(torch.zeros(2)).to_sparse()]
    )
    tensors: Any = {**read(file), key: found}
    torch.save(tensors if rng.random() < 0.8 else [torch.zeros(2)], file)
    return key if isinstance(torch.load(file, weights_only=True), dict) else None


def numbers_as_keys(file: Path, rng: random.Random, trace: Path) -> str | None:
    torch.save({**read(file), 5: torch.zeros(1)}, file)
    return "5"


def odd_zip(file: Path, rng: random.Random, trace: Path) -> str | None:
    buffer = io.BytesIO()
    torch.save(read(file), buffer)
    way = rng.choice(["compressed", "twice", "outside", "bomb", "nothing"])
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(file, "w") as new:
        entries = old.infolist() if way != "nothing" else []
        for entry in entries:
            squeezed = zipfile.ZIP_DEFLATED if way == "compressed" else zipfile.ZIP_STORED
            new.writestr(entry.filename, old.read(entry), squeezed)
        if way == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr(entries[0].filename, old.read(entries[0]))
        if way == "outside":
            new.writestr(rng.choice(["../../evil", "/tmp/evil"]), b"x")
        if way == "bomb":
            new.writestr("archive/data/999", bytes(2**22), zipfile.ZIP_DEFLATED)
    return None


def larger_than_file(file: Path, rng: random.Random, trace: Path) -> str | None:
    tensors = read(file)
    key = rng.choice(sorted(tensors))
    torch.save({**tensors, key: torch.zeros(1).expand(2**20, 2**20)}, file)
    return key


def gone(file: Path, rng: random.Random, trace: Path) -> str | None:
    file.unlink()
    return None


ANY_WEIGHTS = [
    truncated, noise, damaged_header, missing_key, extra_key, wrong_shape, wrong_dtype, not_finite, gone,
]  # fmt: skip
ARCHIVES = [
    code_as_value, code_as_file, code_in_archive, no_tensors, numbers_as_keys, odd_zip, larger_than_file,
]  # fmt: skip


# --- mutations of JSON ---


def no_json(file: Path, rng: random.Random) -> None:
    text = file.read_bytes()
    file.write_bytes(
        rng.choice(
            [
                b"", b"{", b"[]", b"null", b"7", b"\xff\xfe{}", b"[" * 100_000, text[: len(text) // 2],
                text + b"}", b'{"a": ' * 50_000, b"PK\x03\x04", text.replace(b":", b"=", 1),
            ]
        )
    )  # fmt: skip


def bad_value(file: Path, key: str, rng: random.Random) -> None:
    """A value that is right for none of the keys that are tried."""
    config = json.loads(file.read_text())
    config[key] = rng.choice([-1, 0, 10**30, "many", [1, 2, 3], {"a": 1}, 2.5, True, ""])
    if key in ("mm_vision_select_layer", "vision_feature_layer"):
        config[key] = rng.choice([99, -99, "x", [1, 2], 2.5, True, None, 10**30])
    if key in ("lora_alpha",):
        config[key] = rng.choice(["x", None, [1], {}, True])
    if key in ("bias",):
        config[key] = rng.choice(["all", "lora_only", 3])
    if key in ("image_aspect_ratio",):
        config[key] = rng.choice(["anyres", "wide", 7, [1]])
    file.write_text(json.dumps(config))


def bad_index(file: Path, rng: random.Random) -> str | None:
    index = json.loads(file.read_text())
    places = index["weight_map"]
    key = rng.choice(sorted(places))
    other = next(name for name in places.values() if name != places[key])
    way = rng.randrange(7)
    if way == 0:
        places[key] = rng.choice(
            [
                "../" + places[key],
                "/etc/passwd",
                "a/b.bin",
                "..",
                "",
                7,
                None,
                "../../tower/model.safetensors",
            ]
        )
    elif way == 1:
        places[key] = other
    elif way == 2:
        del places[key]
    elif way == 3:
        key = "model.layers.7.extra"
        places[key] = other
    elif way == 4:
        places[key] = "model-00009-of-00002.safetensors"
        key = ""
    elif way == 5:
        index["weight_map"], key = rng.choice([[], {}, None, "x", 3]), ""
    else:
        index, key = {"metadata": {}}, ""
    file.write_text(json.dumps(index))
    return key or None


def mutate(case: Case, root: Path, rng: random.Random, trace: Path) -> tuple[str, str, str | None]:
    """Damages something of a copy; returns what was done, the file, and the key that must be named."""
    roll = rng.random()
    if case.index and roll < 0.2:
        return "index", "", bad_index(root / case.index, rng)
    configs = sorted(case.configs)
    if configs and roll < 0.4:
        name = rng.choice(configs)
        keys = case.configs[name]
        if keys and rng.random() < 0.7:
            key = rng.choice(keys)
            bad_value(root / name, key, rng)
            return f"value of {key}", Path(name).name, None
        no_json(root / name, rng)
        return "JSON", Path(name).name, None
    name = rng.choice(case.weights)
    archive = name.endswith(".bin")
    change = rng.choice(ARCHIVES if archive and rng.random() < 0.5 else ANY_WEIGHTS)
    key = change(root / name, rng, trace)
    return change.__name__, Path(name).name if change is not gone else "", key


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_a_mutated_checkpoint_is_refused(seed: int, sound: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    case = CASES[seed % len(CASES)]
    root = tmp_path / "copy"
    shutil.copytree(sound[case.name], root)
    trace = tmp_path / "trace"
    done, file, key = mutate(case, root, rng, trace)
    (tmp_path / "place").mkdir()
    with pytest.raises(WeightsError) as caught:
        import_case(case, root, tmp_path / "place" / "out")
    told = str(caught.value)
    assert not trace.exists(), done
    assert os.environ.get(CANARY) is None
    assert list((tmp_path / "place").iterdir()) == [], done
    assert caught.value.remedy, told
    assert file in told, f"{done}: {told}"
    assert key is None or key in told, f"{done} {key}: {told}"
    assert str(tmp_path / "place") not in told, f"a path that is gone: {told}"
