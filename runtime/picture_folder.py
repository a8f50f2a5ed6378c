"""What a folder of pictures holds: files in the order of their names, and classes where sub-folders are ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .moves import LOST_AND_FOUND
from .picture import PictureReader

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """Pictures below ``root``. With ``classes``, names in order, ``labels`` (N,) int64 says which is whose."""

    root: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    labels: NDArray[np.int64] | None = None

    @property
    def names(self) -> list[str]:
        """The files, relative to the folder."""
        return [str(path.relative_to(self.root)) for path in self.files]

    def read(self, reader: PictureReader) -> NDArray[np.uint8]:
        """All of them, (N, channels, size, size). Raises InputError for the first that cannot be read."""
        images = np.empty((len(self.files), reader.channels, reader.size, reader.size), np.uint8)
        with ThreadPoolExecutor() as pool:
            for image, picture in zip(images, pool.map(reader.read, self.files), strict=True):
                image[:] = picture.pixels
        return images


def list_pictures(folder: str | os.PathLike[str]) -> PictureFolder:
    """Every picture at any depth, hidden ones too. Raises InputError if there is none."""
    root = Path(folder)
    return PictureFolder(root, _some(root, _pictures(root.rglob("*"))))


def list_classes(folder: str | os.PathLike[str]) -> PictureFolder:
    """Pictures by class: a sub-folder each, its pictures at any depth; or without sub-folders, of no class.

    Files and classes hidden by a dot before their names are left out, and lost+found. Raises InputError for a class
    without pictures, and for pictures beside the sub-folders, whose class nobody knows.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"no folder at '{root}'; expected a folder of images")
    folders = (entry.name for entry in root.iterdir() if entry.is_dir())
    classes = sorted(name for name in folders if not name.startswith(".") and name != LOST_AND_FOUND)
    loose = _pictures(root.iterdir(), hidden=False)
    if not classes:
        return PictureFolder(root, _some(root, loose))
    if loose:
        raise InputError(
            f"'{root}' has images beside its class folders, such as '{loose[0].name}'; expected either images or "
            f"one folder per class ('{classes[0]}', ...)"
        )
    files = [_some(root / name, _pictures((root / name).rglob("*"), hidden=False)) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return PictureFolder(root, tuple(path for found in files for path in found), tuple(classes), labels)


def read_folder(folder: str | os.PathLike[str], channels: int, size: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Every picture below a folder, as it is stored -> (N, channels, size, size) uint8, and their relative names.

    Raises InputError for an unreadable image, one of another size, a channel count that is not 1 or 3, or no image.
    """
    found = list_pictures(folder)
    return found.read(PictureReader(channels, size, upright=False, on_white=False, fit=False)), found.names


def _pictures(paths: Iterable[Path], hidden: bool = True) -> tuple[Path, ...]:
    """The pictures among some paths, in order."""
    return tuple(
        path
        for path in sorted(paths)
        if path.suffix.lower() in SUFFIXES and (hidden or not path.name.startswith(".")) and path.is_file()
    )


def _some(folder: Path, found: tuple[Path, ...]) -> tuple[Path, ...]:
    if not found:
        raise InputError(f"no images in '{folder}'; expected files ending in {', '.join(SUFFIXES)}")
    return found
