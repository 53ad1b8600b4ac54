"""Real weights in foreign formats become plain folders, and nothing unpinned is accepted."""

import base64
import hashlib
import io
import os
import stat
import tarfile

import numpy as np
import pytest
import torch

from rayva.errors import DataError, StorageError, WeightsError
from rayva.orchestration import smol_assets
from rayva.orchestration.smol_assets import NpmPackage, convert_efficientnet
from rayva.vision.efficientnet import EfficientNetLite0
from rayva.vision.towers import load_tower


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_what_was_fetched_loads_as_the_tower_that_it_is(tmp_path):
    network = EfficientNetLite0().eval()
    state = {**network.state_dict(), "_fc.weight": torch.zeros(2, 2).t()}
    torch.save(state, tmp_path / "w.pth")
    convert_efficientnet(tmp_path / "w.pth", tmp_path / "vision")
    tower = load_tower(str(tmp_path / "vision"), "efficientnet_lite", -1, image_size=64, aspect="pad")
    pixels_1HW3 = np.full((1, 64, 64, 3), (127, 255, 0), np.uint8)
    # As the Lite models were trained: (v - 127) / 128.
    pixels_13HW = torch.tensor([0.0, 1.0, -127 / 128]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    with torch.no_grad():
        expected_1ND = network(pixels_13HW)
    torch.testing.assert_close(tower.encode_uint8(pixels_1HW3), expected_1ND, atol=1e-4, rtol=1e-3)


def test_weights_that_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"_conv_stem.weight": Payload()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        convert_efficientnet(tmp_path / "w.pth", tmp_path / "vision")
    assert not (tmp_path / "ran").exists()
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no EfficientNet"):
        convert_efficientnet(tmp_path / "w.pth", tmp_path / "vision")
    (tmp_path / "w.pth").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="cannot be read"):
        convert_efficientnet(tmp_path / "w.pth", tmp_path / "vision")


def archive_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def fake_npm(folder, archive, status=0):
    """An npm that packs `archive`, whatever it is asked for."""
    folder.mkdir()
    (folder / "archive").write_bytes(archive)
    script = '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\n'
    script += f'cp "{folder}/archive" "$2/p-1.0.0.tgz" && echo p-1.0.0.tgz\necho refused >&2; exit {status}\n'
    (folder / "npm").write_text(script)
    (folder / "npm").chmod((folder / "npm").stat().st_mode | stat.S_IXUSR)


def pinned(content):
    return NpmPackage("@scope/p", "1.0.0", base64.b64encode(hashlib.sha512(content).digest()).decode())


def test_pinned_archives_are_unpacked_and_others_refused(tmp_path, monkeypatch):
    archive = archive_of({"package.json": b"{}", "assets/a.webp": b"a"})
    fake_npm(tmp_path / "bin", archive)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(smol_assets, "EMOJI_PACKAGES", (pinned(archive),))
    smol_assets._fetch_emoji(tmp_path / "emoji", tmp_path / "scratch")
    unpacked = tmp_path / "emoji" / "node_modules" / "@scope" / "p"
    assert (unpacked / "assets" / "a.webp").read_bytes() == b"a"
    monkeypatch.setattr(smol_assets, "EMOJI_PACKAGES", (pinned(b"something else"),))
    with pytest.raises(DataError, match="not the archive that was pinned"):
        smol_assets._fetch_emoji(tmp_path / "other", tmp_path / "scratch")
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").rglob("*.webp"))


def test_a_failed_or_missing_npm_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="npm is not installed"):
        smol_assets._fetch_emoji(tmp_path / "emoji", tmp_path / "scratch")
    monkeypatch.undo()
    fake_npm(tmp_path / "bin", b"", status=1)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(DataError, match=r"npm pack .* failed: refused"):
        smol_assets._fetch_emoji(tmp_path / "emoji", tmp_path / "scratch")


def test_finished_parts_are_not_fetched_again(tmp_path, monkeypatch):
    calls = []

    def maker(part):
        def make(target, scratch):
            calls.append(part)
            if fail == part:
                raise DataError("the network is gone")
            target.mkdir()
            (target / "x").write_text(part)

        return make

    for part in ("emoji", "language", "vision"):
        monkeypatch.setattr(smol_assets, f"_fetch_{part}", maker(part))
    fail = "language"
    with pytest.raises(DataError, match="the network is gone"):
        smol_assets.fetch(tmp_path / "assets")
    fail = None
    smol_assets.fetch(tmp_path / "assets")
    smol_assets.fetch(tmp_path / "assets")
    assert calls == ["emoji", "language", "language", "vision"]
    names = {path.name for path in (tmp_path / "assets").iterdir()}
    assert names == {"emoji", "language", "vision", "assets.json"}
