"""Decode image files of any kind to 8-bit RGB."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from softmask_plugin.errors import UserError, reason_of

# Larger images are refused before they are decoded: Pillow only warns, up to twice as many pixels.
MAX_PIXELS = 89_478_485

# Formats of photographs and graphics. Pillow would pass EPS, which is a program, to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Endings of the files that are images
IMAGE_SUFFIXES = tuple("jpg jpeg png webp avif bmp gif jp2 ppm tif tiff".split())


class UnreadableImageError(UserError):
    """An image file cannot be decoded; the message is its path and the reason."""


def open_rgb(
    path: str | Path, min_side: int | None = None, data: bytes | None = None
) -> Image.Image:
    """Decode an image file, upright (EXIF orientation applied), as 8-bit RGB.

    Args:
        path: The file.
        min_side: Decode a JPEG at 1/2, 1/4 or 1/8 of its size (several times as fast) as long as no
            side becomes shorter than this, in pixels. None: full size.
        data: The file's content, if it was read before (from an archive, say); ``path`` then only
            names it in messages.

    Raises:
        UnreadableImageError: The file is missing or truncated, has more than ``MAX_PIXELS``, is no
            image of one of the ``FORMATS``, or is a folder, pipe, socket or device.
    """
    try:
        if data is None and not stat.S_ISREG(os.stat(path).st_mode):  # opening it could hang
            raise ValueError("not a regular file, but a folder, pipe, socket or device")
        source = path if data is None else BytesIO(data)
        with _whole_files_only(), Image.open(source, formats=_known_formats()) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{size}: it must have 1 to {MAX_PIXELS:,}")
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except UnidentifiedImageError as error:  # its message may contain an address in memory
        raise UnreadableImageError(f"{path}: no image of a known format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        # The full text of a system error repeats the path
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UnreadableImageError(f"{path}: {reason}") from error


@cache
def _known_formats() -> list[str]:  # some are optional in a build of Pillow
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Make truncated files an error: LAVIS tells Pillow to fill them up with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB; transparent parts become white.

    16-bit images are scaled to 8 bits. Modes I and F have no range of their own: values are divided
    by the smallest of 1 (F only), 255 and 65,535 that bounds them; if none does or a value is
    negative, they are stretched from their minimum to their maximum.
    """
    if image.mode == "La":  # Pillow converts it only to LA
        image = image.convert("LA")
    if image.mode.startswith("I;16"):
        image = _eight_bits(np.asarray(image, dtype=np.float64) / 65535)
    elif image.mode in ("I", "F"):
        image = _eight_bits(_unit_range(image))
    elif image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Others than plain images belong to a file, and caches such as streamlit's cannot hash them
    is_plain = type(image) is Image.Image and image.mode == "RGB"
    return image if is_plain else image.convert("RGB")


def _unit_range(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    for bound in (1, 255, 65535) if image.mode == "F" else (255, 65535):
        if low >= 0 and high <= bound:
            return values / bound
    return (values - low) / max(high - low, np.finfo(np.float64).tiny)


def _eight_bits(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
