"""Bytes from strangers: every bad image has its reason, every odd one becomes upright 8-bit RGB."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import random
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from rayva.data.locations import open_input
from rayva.errors import DataError
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes
from tests.s3 import DeadPort, closed_door, credentials

SIZE = (40, 30)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def reason(data: bytes | None, **limits: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, **limits)
    return caught.value.reason


def huge_png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_file_is_truncated_wherever_it_is_cut(form: str) -> None:
    data = encoded(noise(), form)
    decode_image(data)
    for share in (0.05, 0.5):
        assert reason(data[: int(len(data) * share)]) == "truncated"


def test_no_bytes_and_other_files_have_their_own_reasons() -> None:
    assert reason(None) == "missing"
    assert reason(b"") == "truncated"
    assert reason(b"<html>Not found</html>") == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    ppm = encoded(noise(), "PPM")  # Pillow reads it, but it is not on the list of formats
    assert reason(ppm) == "not_an_image"


def test_enormous_images_are_refused_before_a_pixel_is_decoded() -> None:
    for side in (10_000, 60_000, 2**31 - 1):  # the last two are above Pillow's own limit too
        assert reason(huge_png_header(side, side), max_pixels=10**7) == "too_many_pixels"
    assert reason(encoded(noise(), "PNG"), max_pixels=SIZE[0] * SIZE[1] - 1) == "too_many_pixels"
    decode_image(encoded(noise(), "PNG"), max_pixels=SIZE[0] * SIZE[1])
    data = encoded(noise(), "PNG")
    assert reason(data, max_bytes=len(data) - 1) == "too_many_bytes"


def test_a_limit_above_pillows_own_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    header = huge_png_header(14_000, 14_000)
    assert reason(header) == "too_many_pixels"
    assert reason(header, max_pixels=14_000 * 14_000) == "truncated", "it is decoded, and found to be empty"
    assert reason(header, max_pixels=14_000 * 14_000 - 1) == "too_many_pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] // 4)
    assert decode_image(encoded(noise(), "WEBP"), max_pixels=SIZE[0] * SIZE[1]).size == SIZE


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    for form in ("JPEG", "TIFF"):
        pixel = np.asarray(decode_image(encoded(red, form)))[5, 5]
        assert pixel[0] > 200
        assert pixel[1:].max() < 60


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_keeps_its_shades(form: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode_image(encoded(Image.fromarray(ramp), form))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], ramp >> 8)


def test_floating_point_pixels_are_refused() -> None:
    assert reason(encoded(Image.new("F", SIZE, 0.5), "TIFF")) == "not_an_image"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "green", "blue")]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    if form == "WEBP":
        options["lossless"] = True
    image = decode_image(encoded(frames[0], form, **options))
    assert image.size == SIZE
    assert image.getpixel((3, 3)) == (255, 0, 0)


def test_exif_orientation_is_applied_and_does_not_stay() -> None:
    image = Image.new("RGB", SIZE, "white")
    image.paste("black", (0, 0, SIZE[0], 15))  # black above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == SIZE[::-1]
    pixels = np.asarray(upright.convert("L"))
    assert pixels[:, -5:].max() < 60  # what was above is now on the right
    assert pixels[:, :5].min() > 200
    assert 0x0112 not in upright.getexif()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    clear = Image.new("RGBA", SIZE, (200, 0, 0, 0))
    clear.paste((0, 0, 200, 255), (0, 0, 10, 10))
    data = encoded(clear.convert(mode), "PNG") if mode != "P" else encoded(clear.quantize(8), "PNG")
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.getpixel((30, 20)) == (255, 255, 255)
    assert image.getpixel((3, 3))[0] < 100


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    assert decode_image(encoded(noise().convert(mode), "PNG")).mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = random.Random(0)
    makers: list[Callable[[], bytes]] = [
        lambda form=form: encoded(noise(), form)  # type: ignore[misc]
        for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    ]
    refused = 0
    for make in makers:
        good = make()
        for _ in range(150):
            data = bytearray(good)
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"
            except BadImage:
                refused += 1
    assert refused > 100


def test_bad_image_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "ends early")))
    assert (error.reason, error.detail) == ("truncated", "ends early")
    assert "ends early" in str(error)


@pytest.mark.parametrize(
    "uri",
    [
        "nosuch://x/y.png", "nopackage://x/y.png", "s3://bucket/x::y.png", "s3://b b/x.png", "s3://", "reference://x",
        "/x\0.png", f"/{'long' * 100}.png",
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_opened_is_the_images_fault(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch, None)
    fsspec.register_implementation("nopackage", "rayva_no_such_package.FileSystem", clobber=True)
    with pytest.raises(BadImage) as caught:
        read_image_bytes(uri)
    assert caught.value.reason == "unreadable"
    assert uri in caught.value.detail


def test_a_picture_that_may_not_be_read_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_door() as address:
        credentials(monkeypatch, address)
        with pytest.raises(BadImage, match=r"unreadable.*Forbidden"):
            read_image_bytes("s3://bucket/x.png")


def test_a_storage_that_fails_says_nothing_about_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch, None)
    with pytest.raises(DataError, match=r"s3://bucket/x\.png cannot be read: Unable to locate credentials"):
        read_image_bytes("s3://bucket/x.png")
    with DeadPort() as address:
        credentials(monkeypatch, address)
        with pytest.raises(
            DataError, match=r"s3://bucket/x\.png cannot be read: Could not connect"
        ) as caught:
            read_image_bytes("s3://bucket/x.png")
    assert not isinstance(caught.value, BadImage)
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


def test_files_are_read_from_paths_and_uris(tmp_path: Path) -> None:
    data = encoded(noise(), "PNG")
    file = tmp_path / "with space::and more.png"
    file.write_bytes(data)
    assert read_image_bytes(str(file)) == data
    assert read_image_bytes(f"file://{file}") == data
    for uri, limit, expected in [
        (str(tmp_path / "none.png"), 10**6, "missing"),
        (str(tmp_path), 10**6, "missing"),
        (str(file), len(data) - 1, "too_many_bytes"),
    ]:
        with pytest.raises(BadImage) as caught:
            read_image_bytes(uri, limit)
        assert caught.value.reason == expected
    assert read_image_bytes(str(file), len(data)) == data


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_unreadable_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    with socket.socket(socket.AF_UNIX) as unix:
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "socket":
            unix.bind(str(file))
        else:
            file = Path("/dev/zero")
        with pytest.raises(BadImage) as caught:
            read_image_bytes(str(file))
    assert caught.value.reason == "unreadable"
    assert str(file) in caught.value.detail


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers /STATUS.png with that status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"abc")

    def do_HEAD(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_that_is_down_or_in_trouble_stops_and_a_missing_file_does_not() -> None:
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read_image_bytes(f"{address}/200.png") == b"abc"
        for status, expected in ((404, "missing"), (410, "missing"), (403, "unreadable")):
            with pytest.raises(BadImage) as caught:
                read_image_bytes(f"{address}/{status}.png?token=hunter2")
            assert caught.value.reason == expected
            assert "hunter2" not in caught.value.detail
        with pytest.raises(DataError, match=r"503\.png cannot be read: 503"):
            read_image_bytes(f"{address}/503.png")
        server.shutdown()
    for read in (read_image_bytes, lambda uri: open_input(uri, "data.captions")):
        with DeadPort() as dead, pytest.raises(DataError, match=r"cannot be read: Cannot connect"):
            read(f"{dead}/a.png")
