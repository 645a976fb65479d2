"""Bad image files of every kind: each is skipped and counted, or gives a one-line error."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_folders
from lavis.common.registry import registry
from PIL import Image
from torch.utils.data import DataLoader

from softmask_plugin.datasets import images
from softmask_plugin.datasets.images import MAX_PIXELS, UnreadableImageError, open_rgb, to_rgb
from softmask_plugin.errors import UserError
from softmask_plugin.explain.gallery import readable_images
from softmask_plugin.processors import ImageEvalProcessor, ImageTrainProcessor

MODES = (
    """1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA La PA RGBX RGBa I;16 I;16L I;16B I;16N""".split()
)


def picture(path: str | Path, size=(40, 30), **options) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return Path(path)


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size, with hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def cut(kind: str) -> bytes:
    path = picture("whole", format=kind)
    return path.read_bytes()[: path.stat().st_size * 2 // 3]


BAD = {
    "0 bytes": lambda: b"",
    "HTML": lambda: b"<!doctype html><html><title>404 Not Found</title></html>",
    "text": lambda: b"image not found",
    "JPEG header alone": lambda: b"\xff\xd8\xff\xe0",
    "truncated JPEG": lambda: cut("JPEG"),
    "truncated PNG": lambda: cut("PNG"),
    "truncated GIF": lambda: cut("GIF"),
    "truncated WebP": lambda: cut("WEBP"),
    "truncated TIFF": lambda: cut("TIFF"),
    "no pixels": lambda: png(0, 5),
    "bomb beyond Pillow's warning": lambda: png(10_000, 9_000),
    "bomb beyond Pillow's error": lambda: png(60_000, 60_000),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "PDF": lambda: b"%PDF-1.4\n%%EOF",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Three pictures in a folder, and a run's folder beside it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path / "run"))
    Path("photos").mkdir()
    for name in "abc":
        picture(f"photos/{name}.jpg")
    return tmp_path


def build(*names: str, split: str = "train"):
    rows = [{"image": name, "caption": f"a caption of {name}"} for name in names]
    Path("captions.json").write_text(json.dumps(rows))
    return toy_folders.build("captions_folder", f"captions.{split}=captions.json")[split]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_skipped_counted_and_named(here, caplog, kind):
    Path("photos/b.jpg").write_bytes(BAD[kind]())
    for min_side in (None, 1):
        with pytest.raises(UnreadableImageError, match="photos/b.jpg: ."):
            open_rgb("photos/b.jpg", min_side)
    val = build("a.jpg", "b.jpg", "c.jpg", split="val")
    assert val.image == ["a.jpg", "c.jpg"]
    train = build("a.jpg", "b.jpg", "c.jpg")
    assert [train[i]["image_id"] for i in range(3)] == [0, 2, 2]
    assert "Skipped 1 unreadable images" in caplog.text
    (line,) = Path("run/skipped_images.log").read_text().splitlines()
    assert "b.jpg: " in line


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_size_before_it_is_decoded(here, monkeypatch):
    Path("bomb.png").write_bytes(png(10_000, 9_000))

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other packages set it
    with pytest.raises(UnreadableImageError, match="10000 x 9000 pixels: .* 1 to 89,478,485"):
        open_rgb("bomb.png")


def test_the_largest_image_is_accepted(here, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1200)
    assert open_rgb("photos/a.jpg").size == (40, 30) and MAX_PIXELS > 1200
    monkeypatch.setattr(images, "MAX_PIXELS", 1199)
    with pytest.raises(UnreadableImageError):
        open_rgb("photos/a.jpg")


def test_no_format_is_a_program():
    assert "EPS" not in images._known_formats()
    assert {"JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"} <= set(images._known_formats())


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_odd_shape_becomes_a_whole_batch(here, size, suffix):
    path = picture(f"odd.{suffix}", size)
    train, plain = ImageTrainProcessor(16), ImageEvalProcessor(16)
    torch.manual_seed(0)
    made = [train(open_rgb(path, train.min_side)) for _ in range(20)] + [plain(open_rgb(path))]
    batch = torch.stack(made)
    assert batch.shape == (21, 3, 16, 16) and batch.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read(mode):
    rgb = to_rgb(Image.new(mode, (5, 4)))
    assert (rgb.mode, rgb.size) == ("RGB", (5, 4))
    tensor = ImageTrainProcessor(8)(Image.new(mode, (5, 4)))
    assert tensor.shape == (3, 8, 8) and tensor.isfinite().all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "gif", "webp", "jpg", "bmp"])
def test_every_mode_that_a_format_stores_is_read(here, suffix):
    stored = 0
    for mode in MODES:
        try:
            Image.new(mode, (5, 4)).save(f"a.{suffix}")
        except (OSError, ValueError, SystemError):  # it cannot store that mode
            continue
        stored += 1
        assert open_rgb(f"a.{suffix}").mode == "RGB", mode
    assert stored >= 2


def test_a_pipe_or_a_folder_of_an_images_name_does_not_hang(here, caplog):
    os.mkfifo("photos/pipe.jpg")
    Path("photos/folder.jpg").mkdir()
    os.symlink("a.jpg", "photos/link.jpg")
    start = time.monotonic()
    train = build("pipe.jpg", "folder.jpg", "link.jpg", "none.jpg", "a.jpg")
    assert [train[i]["image_id"] for i in range(2)] == [0, 1] and len(train) == 2
    assert time.monotonic() - start < 5
    assert "Skipped 3 missing images" in caplog.text


def test_what_is_no_regular_file_is_refused_by_name(here):
    """Opening a pipe waits for a writer; here there is none."""
    os.mkfifo("photos/pipe.jpg")
    os.symlink("pipe.jpg", "photos/link.jpg")
    Path("photos/folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("photos/socket.jpg")
    for name in ("photos/pipe.jpg", "photos/link.jpg", "photos/folder.jpg", "photos/socket.jpg"):
        with pytest.raises(UnreadableImageError, match=f"{name}: not a regular file"):
            open_rgb(name)
    with pytest.raises(UnreadableImageError, match="/dev/zero: not a regular file"):
        open_rgb("/dev/zero")
    good, left_out = readable_images(Path("photos"), 100)
    assert {file.name for file in good} == {"a.jpg", "b.jpg", "c.jpg"} and left_out == 4


def test_a_workers_error_is_one_line(here):
    """torch raises it again in the main process, with the worker's traceback as its message."""
    train = build("a.jpg", "b.jpg")
    for path in Path("photos").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list(DataLoader(train, 2, num_workers=1))
    assert str(caught.value).startswith("100 images in a row cannot be read, the last was ")
    assert "\n" not in str(caught.value)
