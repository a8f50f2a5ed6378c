"""Patches <-> pixels, grids, PNG. Images are (N, channels, size, size) float32 in [-1, 1] units."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import replacing


def patchify(images: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """(N, C, H, W) -> (N, T, D): patches in rows, each in channel, row, column order (PyTorch's ``unfold``)."""
    n, c, h, w = images.shape
    p = patch_size
    x = images.reshape(n, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(x.reshape(n, (h // p) * (w // p), c * p * p))


def unpatchify(patches: NDArray[Any], patch_size: int, channels: int) -> NDArray[Any]:
    """(N, T, D) -> (N, C, H, W); the inverse of :func:`patchify` for square images."""
    n, t, _ = patches.shape
    side, p = math.isqrt(t), patch_size
    x = patches.reshape(n, side, side, channels, p, p).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(x.reshape(n, channels, side * p, side * p))


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """[-1, 1] -> 0..255, clipped; what is not a number becomes black."""
    bounded = np.clip(np.nan_to_num(np.asarray(images, np.float32), nan=-1.0), -1, 1)
    return np.asarray(np.rint((bounded + 1) * 127.5), np.uint8)


def grid(images: NDArray[Any], columns: int | None = None, gap: int = 2, background: int = 255) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1] -> one picture (rows, columns, C) uint8, images in reading order, by default on white."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), background, np.uint8)
    for i, image in enumerate(to_uint8(images)):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return canvas


def png(picture: NDArray[np.uint8], text: Mapping[str, str], zoom: int = 1) -> bytes:
    """(rows, columns, C) uint8 as a PNG file, with text chunks.

    C is 1, 3 or 4; other channel counts show their first channel. ``zoom`` repeats each pixel.
    """
    from PIL import Image, PngImagePlugin

    channels = picture.shape[2]
    if channels not in (3, 4):
        picture = picture[:, :, 0]
    picture = picture.repeat(zoom, 0).repeat(zoom, 1)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def write_png(path: str | os.PathLike[str], picture: NDArray[np.uint8], text: Mapping[str, str], zoom: int = 1) -> None:
    """Write what :func:`png` makes, replacing ``path`` whole or not at all."""
    content = png(picture, text, zoom)
    with replacing(path) as file:
        file.write(content)


def read_folder(folder: str | os.PathLike[str], channels: int, size: int) -> tuple[NDArray[np.uint8], list[str]]:
    """What :func:`.picture_folder.read_folder` reads, under the name it always had; loaded when it is asked for."""
    from . import picture_folder

    return picture_folder.read_folder(folder, channels, size)
