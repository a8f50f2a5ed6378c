"""Pictures over the wire: sheets of images as PNG, and a picture that someone sent as the model wants it."""

from __future__ import annotations

import base64
import math
from typing import Any

from numpy.typing import NDArray

from ..runtime.image import grid, png
from ..runtime.picture import Picture, PictureReader

MEDIA_TYPES = ("image/png", "image/jpeg")
LARGEST_BYTES = 8 << 20
LARGEST_PIXELS = 1 << 24  # 4096 x 4096, 48 MiB once decoded


def columns_of(n: int) -> int:
    """How many images of a sheet stand side by side."""
    return math.ceil(math.sqrt(n))


def sheet(images: NDArray[Any]) -> str:
    """(N, C, H, W) in [-1, 1] -> one PNG, ``columns_of(N)`` images a row without gaps, in base64."""
    return base64.b64encode(png(grid(images, columns_of(len(images)), gap=0), {})).decode()


def open_picture(data: bytes, channels: int, size: int) -> Picture:
    """Read a PNG or JPEG as the model wants it: turned upright, on white, cropped to its middle, resized.

    Nothing of that is done silently. Raises InputError for what is no picture, is too large, or has more than 8 bits.
    """
    return PictureReader(channels, size, formats=("PNG", "JPEG"), most_pixels=LARGEST_PIXELS).read(data)
