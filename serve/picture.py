"""Pictures over the wire: sheets of images as PNG, and a picture that someone sent as the model wants it."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..runtime.errors import InputError
from ..runtime.image import grid, png

MEDIA_TYPES = ("image/png", "image/jpeg")
LARGEST_BYTES = 8 << 20
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
LARGEST_PIXELS = 1 << 24  # 4096 x 4096, 48 MiB once decoded: read from the header, before anything is decoded


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the model takes it, (channels, size, size) uint8, and what was done to it, a sentence each."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


def columns_of(n: int) -> int:
    """How many images of a sheet stand side by side."""
    return math.ceil(math.sqrt(n))


def sheet(images: NDArray[Any]) -> str:
    """(N, C, H, W) in [-1, 1] -> one PNG, ``columns_of(N)`` images a row without gaps, in base64."""
    return base64.b64encode(png(grid(images, columns_of(len(images)), gap=0), {})).decode()


def open_picture(data: bytes, channels: int, size: int) -> Picture:
    """Read a PNG or JPEG as the model wants it: turned upright, without alpha, cropped to its middle, resized.

    Nothing of that is done silently. Raises InputError for what is no picture, is too large, or has more than 8 bits.
    """
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels; this model has {channels}: send tensors to encode instead")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            _refuse_size(opened)
            opened.load()
            return _fit(opened, channels, size)
    except (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the body cannot be read as a picture; expected a whole PNG or JPEG file") from None


def _refuse_size(opened: Image.Image) -> None:
    if opened.width * opened.height > LARGEST_PIXELS:
        raise InputError(
            f"the picture has {opened.width}x{opened.height} pixels; expected {LARGEST_PIXELS:,} at most: shrink it"
        )
    if opened.mode.startswith(("I", "F")):
        raise InputError("the picture has more than 8 bits a channel; save it with 8")


def _fit(opened: Image.Image, channels: int, size: int) -> Picture:
    notes = []
    upright = ImageOps.exif_transpose(opened)
    if opened.getexif().get(_ORIENTATION) in range(2, 9):
        notes.append("turned upright, as its EXIF data says")
    if "A" in upright.getbands() or "transparency" in upright.info:
        clear = upright.convert("RGBA")
        if clear.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts were put on white")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    mode = "L" if channels == 1 else "RGB"
    plain = upright.convert("RGB")
    if mode == "L" and not _is_gray(plain):
        notes.append("colours became shades of gray")
    plain = plain.convert(mode)
    if plain.size != (size, size):
        was, side = plain.size, min(plain.size)
        cropped = "" if was[0] == was[1] else f" cropped to its middle {side}x{side},"
        notes.append(f"the picture is {was[0]}x{was[1]} pixels:{cropped} resized to {size}x{size}")
        plain = ImageOps.fit(plain, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(plain, np.uint8).reshape(size, size, channels).transpose(2, 0, 1)
    return Picture(np.ascontiguousarray(pixels), tuple(notes))


def _is_gray(picture: Image.Image) -> bool:
    pixels = np.asarray(picture)
    return bool((pixels == pixels[:, :, :1]).all())
