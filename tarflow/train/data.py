"""Images to train on, as plain uint8 arrays, and the endless stream of noisy batches made from them.

Everything random is a pure function of the seed and of a position in that stream, so that a run can be stopped,
resumed, or spread over more processes without changing a single draw.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class DataError(ValueError):
    """Images that cannot be trained on: none found, unreadable, or of a kind that is not expected."""

    exit_code = 2


class MissingPackage(ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Split:
    """Images (N, channels, size, size) uint8 and labels (N,) int64, which are None for unconditional data."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[np.int64] | slice) -> Split:
        return Split(self.images[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True, slots=True)
class Dataset:
    """What to train on, and what is held out to measure it. ``classes`` are the names behind the labels."""

    name: str
    train: Split
    held_out: Split
    classes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        return int(self.train.images.shape[2])

    def fingerprint(self) -> str:
        """Tells this training set from another: its length and a checksum of pixels and labels."""
        checksum = zlib.crc32(np.ascontiguousarray(self.train.images).data)
        if self.train.labels is not None:
            checksum = zlib.crc32(np.ascontiguousarray(self.train.labels).data, checksum)
        return f"{self.name}: {len(self.train)} images, crc32 {checksum:08x}"


def split_every(name: str, everything: Split, hold_out: int, offset: int, classes: Sequence[str]) -> Dataset:
    """Hold out the images whose index leaves ``offset`` when divided by ``hold_out`` (0: hold out nothing)."""
    held = np.zeros(len(everything), bool)
    if hold_out:
        held[offset::hold_out] = True
    return Dataset(name, everything.take(np.flatnonzero(~held)), everything.take(np.flatnonzero(held)), tuple(classes))


def digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8, grey, 10 classes; every sixth held out.

    Their values 0..16 become 0..255. Raises :class:`MissingPackage` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise MissingPackage("--data digits needs scikit-learn: pip install 'tarflow[train]'") from None
    raw = load_digits()
    images = np.round(raw.images * 255 / 16).astype(np.uint8)[:, None]
    return split_every("digits", Split(images, raw.target.astype(np.int64)), 6, 5, [str(k) for k in range(10)])


def folder(path: str | os.PathLike[str], size: int, channels: int = 3, hold_out: int = 0) -> Dataset:
    """Images below a folder, cropped to the middle square and resized to ``size``, held in memory.

    Subfolders are classes in the order of their names; a folder without subfolders is unconditional data. Every
    ``hold_out``-th image is kept for measuring (0: none). Raises :class:`DataError` for anything that would make a
    silently wrong training set, :class:`MissingPackage` without Pillow.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no folder at '{path}'; expected 'digits' or a folder of images")
    if size < 1 or channels not in (1, 3) or hold_out < 0 or hold_out == 1:
        raise DataError(
            f"image size {size}, channels {channels}, hold-out {hold_out}; expected a size of 1 or more, 1 or 3 "
            "channels, and 0 or at least 2 to hold out every n-th image"
        )
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose = [file for file in sorted(path.iterdir()) if _is_image(file)]
    if classes and loose:
        raise DataError(
            f"'{path}' has images beside its class folders, such as '{loose[0].name}'; expected either images or "
            f"one folder per class ('{classes[0]}', ...)"
        )
    files = [[file for file in sorted((path / name).rglob("*")) if _is_image(file)] for name in classes] or [loose]
    for name, found in zip(classes or [""], files, strict=True):
        if not found:
            raise DataError(f"no images in '{path / name}'; expected files ending in {', '.join(SUFFIXES)}")
    read = _reader(size, channels)
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, [file for found in files for file in found])))
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files]) if classes else None
    return split_every(path.resolve().name, Split(images, labels), hold_out, hold_out - 1, classes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def pillow() -> ModuleType:
    """``PIL.Image``. Raises :class:`MissingPackage` that says what to install."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackage("reading and writing images needs Pillow: pip install 'tarflow[train]'") from None
    return Image


def _reader(size: int, channels: int) -> Callable[[Path], NDArray[np.uint8]]:
    """A function from a file to its pixels, (channels, size, size)."""
    image_module = pillow()
    from PIL import ImageOps

    def read(path: Path) -> NDArray[np.uint8]:
        try:
            with image_module.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"'{path}' has pixels of more than 8 bits (mode {image.mode}); convert it first")
                upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
            raise DataError(f"'{path}' cannot be read as an image ({error}); repair or remove it") from None
        square = ImageOps.fit(upright, (size, size), image_module.Resampling.BICUBIC)
        return np.asarray(square, np.uint8).reshape(size, size, channels).transpose(2, 0, 1)

    return read


def write_grid(images: Tensor, path: str | os.PathLike[str], columns: int) -> None:
    """Write images (N, channels, size, size) in [-1, 1] as one PNG, row after row. Values outside are clipped.

    Images have a margin, and those of less than 32 pixels are enlarged, so that one can look at them.
    """
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    zoom = max(32 // pixels.shape[-1], 1)
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    count, channels, size, _ = pixels.shape
    rows, cell = -(-count // columns), size + 2
    sheet = torch.full((rows * columns, channels, cell, cell), 64, dtype=torch.uint8)
    sheet[:count, :, 1:-1, 1:-1] = pixels
    tiles = sheet.view(rows, columns, channels, cell, cell).permute(0, 3, 1, 4, 2)
    flat = tiles.reshape(rows * cell, columns * cell, channels).numpy()
    pillow().fromarray(flat if channels == 3 else flat[:, :, 0]).save(path)


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A fresh generator that depends on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def noisy(images: Tensor, noise_std: float | None, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
    """uint8 images (B, ...) -> [-1, 1] with the model's training noise; image i's noise depends on ``keys[i]`` alone.

    Gaussian noise of ``noise_std``, or for None uniform dequantisation (arXiv 2412.06329, on noise augmented training).
    """
    draw = torch.rand if noise_std is None else torch.randn
    shape, device = images.shape[1:], images.device
    noise = torch.stack([draw(shape, generator=generator(device, *key), device=device) for key in keys])
    if noise_std is None:
        return (images.float() + noise) * (2 / 256) - 1
    return images.float() / 127.5 - 1 + noise_std * noise


def shift(images: Tensor, by: Tensor) -> Tensor:
    """Move uint8 images (B, channels, size, size) right and down by (B, 2) pixels, or fractions: bicubic."""
    moves = torch.eye(2, 3).repeat(len(images), 1, 1)
    moves[:, :, 2] = -by * (2 / images.shape[-1])  # grids span two units
    grid = functional.affine_grid(moves, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, "bicubic", padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


@dataclass(slots=True)
class Stream:
    """The endless sequence of training examples: epoch after epoch, each in an order of its own."""

    split: Split
    noise_std: float | None
    seed: int
    drop_label: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    _epoch: int = -1
    _order: NDArray[np.int64] | None = None

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Which images stand at positions ``start`` to ``start + count`` of the stream."""
        epochs, offsets = np.divmod(np.arange(start, start + count), len(self.split))
        return np.concatenate([self._shuffled(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or epoch != self._epoch:
            shuffle = generator(torch.device("cpu"), self.seed, "order", epoch)
            self._order, self._epoch = torch.randperm(len(self.split), generator=shuffle).numpy(), epoch
        return self._order

    def batch(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Examples ``start`` to ``start + count``: images (count, channels, size, size) in [-1, 1], labels (count,).

        A dropped label is -1, the null class.
        """
        part = self.split.take(self.rows(start, count))
        keys = [(self.seed, "example", position) for position in range(start, start + count)]
        coins = torch.stack([torch.rand(4, generator=generator(torch.device("cpu"), *key, "coins")) for key in keys])
        images = torch.from_numpy(part.images)
        if self.flip:
            images = torch.where((coins[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.jitter:
            images = shift(images, (2 * coins[:, 2:] - 1) * self.jitter)
        images = noisy(images.to(device), self.noise_std, keys)
        if part.labels is None:
            return images, None
        labels = torch.from_numpy(part.labels)
        return images, torch.where(coins[:, 1] < self.drop_label, -1, labels).to(device)
