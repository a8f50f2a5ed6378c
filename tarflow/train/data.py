"""Images to train on, and images held out to measure with, as plain uint8 arrays."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError, MachineError
from ..runtime.picture import PictureReader
from ..runtime.picture_folder import list_pictures


@dataclass(frozen=True, slots=True)
class Split:
    """Images (N, channels, size, size) uint8 and labels (N,) int64, which are None for unconditional data."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, which: NDArray[np.int64] | slice) -> Split:
        return Split(self.images[which], None if self.labels is None else self.labels[which])


@dataclass(frozen=True, slots=True)
class Dataset:
    """What to train on, and what is held out to measure it. ``classes`` are the names behind the labels, ``notes`` say
    what of a folder is not in it.
    """

    name: str
    train: Split
    held_out: Split
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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


def split_every(name: str, everything: Split, hold_out: int, classes: Sequence[str]) -> Dataset:
    """Hold out every ``hold_out``-th image (0: none)."""
    held = np.zeros(len(everything), bool)
    if hold_out:
        held[hold_out - 1 :: hold_out] = True
    return Dataset(name, everything.take(np.flatnonzero(~held)), everything.take(np.flatnonzero(held)), tuple(classes))


def digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8, grey, 10 classes; every sixth held out.

    Their values 0..16 become 0..255. Raises MachineError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise MachineError(
            "the digits come with scikit-learn, which is not installed: pip install 'tarflow[train]'", field="data"
        ) from None
    raw = load_digits()
    images = np.round(raw.images * 255 / 16).astype(np.uint8)[:, None]
    return split_every("digits", Split(images, raw.target.astype(np.int64)), 6, [str(k) for k in range(10)])


def folder(path: str | os.PathLike[str], size: int, channels: int = 3, hold_out: int = 0) -> Dataset:
    """Images below a folder, cropped to the middle square and resized to ``size``, held in memory.

    Subfolders are classes in the order of their names; a folder without subfolders is unconditional data. Every
    ``hold_out``-th image is kept for measuring (0: none). Raises InputError for anything that would make a silently
    wrong training set.
    """
    found = list_pictures(path)
    if size < 1:
        raise InputError.of("image_size", size, "1 pixel or more")
    if channels not in (1, 3):
        raise InputError.of("channels", channels, "3 for colour or 1 for grey")
    if hold_out < 0 or hold_out == 1:
        raise InputError.of("hold_out", hold_out, "0 for none, or 2 or more to keep every n-th image")
    images = found.read(PictureReader(channels, size))
    everything = Split(images, found.labels)
    data = split_every(Path(path).resolve().name, everything, hold_out, found.classes)
    return replace(data, notes=tuple(found.notes()))
