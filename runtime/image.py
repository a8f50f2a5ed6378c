"""Patches <-> pixels, grids, PNG. Images are (N, channels, size, size) float32 in [-1, 1] units."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import replacing

if TYPE_CHECKING:
    from PIL import Image

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # what a picture is, by its suffix
_LARGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383}  # pixels; a PNG holds more than memory does
_SAVING: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
_DESCRIPTION = 0x010E  # EXIF's ImageDescription: where JPEG and WebP have room for words


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
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    file = io.BytesIO()
    _image(picture, zoom).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def write_png(path: str | os.PathLike[str], picture: NDArray[np.uint8], text: Mapping[str, str], zoom: int = 1) -> None:
    """Write what :func:`png` makes, replacing ``path`` whole or not at all."""
    content = png(picture, text, zoom)
    with replacing(path) as file:
        file.write(content)


def check_suffix(path: str | os.PathLike[str], known: Collection[str], field: str) -> str:
    """The suffix of a file to write, in lower case; InputError of ``field`` for another than the ``known`` ones."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in known:
        *more, last = known
        listed = f"{', '.join(more)} or {last}" if more else last
        found = f"'{os.fspath(path)}', which ends in {suffix or 'no suffix'}"
        raise InputError.of(field, found, f"a name ending in {listed}", "the suffix decides the format")
    return suffix


def write_picture(
    path: str | os.PathLike[str], picture: NDArray[np.uint8], text: Mapping[str, str], zoom: int = 1
) -> None:
    """Write a picture (rows, columns, C) uint8 in the format of its suffix, one of PICTURES, whole or not at all.

    ``text`` goes into PNG's text chunks; into JPEG and WebP as a description in EXIF, a line each. JPEG is of the
    highest quality that is usual, WebP loses nothing. Raises InputError for other suffixes, and for more pixels a side
    than the format holds.
    """
    form = PICTURES[check_suffix(path, PICTURES, "path")]
    content = png(picture, text, zoom) if form == "PNG" else _with_exif(form, _image(picture, zoom), text)
    with replacing(path) as file:
        file.write(content)


def _with_exif(form: str, image: Image.Image, text: Mapping[str, str]) -> bytes:
    from PIL import Image

    most = _LARGEST_SIDE[form]
    if max(image.size) > most:
        found = f"of a picture of {image.width}x{image.height} pixels"
        raise InputError.of("path", found, f"{most:,} a side, as {form} holds, or fewer", "write PNG, or fewer images")
    about, file = Image.Exif(), io.BytesIO()
    about[_DESCRIPTION] = "\n".join(f"{key}: {value}" for key, value in text.items())
    flat = image.convert("RGB") if image.mode == "RGBA" else image
    flat.save(file, format=form, exif=about, **_SAVING[form])
    return file.getvalue()


def _image(picture: NDArray[np.uint8], zoom: int) -> Image.Image:
    from PIL import Image

    shown = picture if picture.shape[2] in (3, 4) else picture[:, :, 0]
    return Image.fromarray(shown.repeat(zoom, 0).repeat(zoom, 1))


def read_folder(folder: str | os.PathLike[str], channels: int, size: int) -> tuple[NDArray[np.uint8], list[str]]:
    """What :func:`.picture_folder.read_folder` reads, under the name it always had; loaded when it is asked for."""
    from . import picture_folder

    return picture_folder.read_folder(folder, channels, size)
