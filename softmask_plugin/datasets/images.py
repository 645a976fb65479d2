"""Open whatever a folder of images holds as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from softmask_plugin.errors import UserError, reason_of

# More than this is refused before it is decoded: Pillow merely warns here, up to twice as many.
MAX_PIXELS = 89_478_485

# Formats of photographs and graphics. Others need not be read, and Pillow hands EPS, which is a
# program, to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "PA")


class UnreadableImageError(UserError):
    """An image file that cannot be decoded; the message is its path and the reason."""


def open_rgb(
    path: str | Path, min_side: int | None = None, data: bytes | None = None
) -> Image.Image:
    """Decode an image file, upright (EXIF orientation applied), as 8-bit RGB.

    Args:
        path: the file.
        min_side: let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size (several times as fast) as
            long as no side gets shorter than this, pixels. None: full size.
        data: what the file holds, if it was read before (out of an archive, say); ``path`` then
            only names it in messages.

    Raises:
        UnreadableImageError: the file is missing or truncated, has more than ``MAX_PIXELS``, or is
            no image of one of the ``FORMATS``.
    """
    try:
        source = path if data is None else BytesIO(data)
        with _whole_files_only(), Image.open(source, formats=_known_formats()) as image:
            _check_size(image)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:  # whose own message may hold an address in memory
        raise UnreadableImageError(f"{path}: no image of a known format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        # The whole text of a system's error says the name once more.
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UnreadableImageError(f"{path}: {reason}") from error


@cache
def _known_formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image) -> None:
    pixels = image.width * image.height
    if not 0 < pixels <= MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels: it must have 1 to {MAX_PIXELS:,} of them"
        )


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Let truncated files raise: LAVIS tells Pillow to fill them up with grey, everywhere."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB; transparent parts lie over white.

    16-bit images are scaled to 8 bits. Modes I and F carry no range of their own: values are
    divided by the smallest of 1 (F only), 255 and 65,535 that bounds them, and stretched from
    their minimum to their maximum where none does or a value is negative.
    """
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode.startswith("I;16"):
        image = _eight_bits(np.asarray(image, dtype=np.float64) / 65535)
    elif image.mode in ("I", "F"):
        image = _eight_bits(_unit_range(image))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _unit_range(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    for bound in (1, 255, 65535) if image.mode == "F" else (255, 65535):
        if low >= 0 and high <= bound:
            return values / bound
    return (values - low) / max(high - low, np.finfo(np.float64).tiny)


def _eight_bits(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
