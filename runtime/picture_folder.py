"""What a folder of pictures holds: files in the order of their names, classes where it has sub-folders."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .moves import LOST_AND_FOUND
from .picture import PictureReader

SUFFIXES = (  # of picture.FORMATS
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_NOT_OURS = ("__MACOSX", LOST_AND_FOUND, "@eaDir")  # what archivers, file systems and network drives add


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """Pictures below ``root``. With ``classes``, names in order, ``labels`` (N,) int64 says which is whose.

    ``left_out`` counts, by what it is, all else that was found.
    """

    root: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None
    left_out: Counter[str]

    @property
    def names(self) -> list[str]:
        """The files, relative to the folder."""
        return [str(path.relative_to(self.root)) for path in self.files]

    def notes(self) -> list[str]:
        """What was left out, as a sentence, if anything was."""
        return [f"left out of '{self.root}': {_counted(self.left_out)}"] if self.left_out else []

    def read(self, reader: PictureReader) -> NDArray[np.uint8]:
        """All of them, (N, channels, size, size). Raises InputError for the first that cannot be read."""
        return self.read_noted(reader)[0]

    def read_noted(self, reader: PictureReader) -> tuple[NDArray[np.uint8], Counter[str]]:
        """The same; and what was done to pictures, a sentence each, with the number of those it was done to."""
        images = np.empty((len(self.files), reader.channels, reader.size, reader.size), np.uint8)
        done: Counter[str] = Counter()
        with ThreadPoolExecutor() as pool:
            for image, picture in zip(images, pool.map(reader.read, self.files), strict=True):
                image[:] = picture.pixels
                done.update(picture.notes)
        return images, done


def list_pictures(folder: str | os.PathLike[str]) -> PictureFolder:
    """Pictures by class: a sub-folder each, its pictures at any depth; or without sub-folders, of no class.

    A picture in place of the folder is that one alone. Links are followed, a folder once in a class. Left out and
    counted are hidden files and folders, those that tools leave behind, and files of other suffixes. Raises
    InputError for a class without pictures, for pictures beside the sub-folders, whose class nobody knows, and for
    a folder that cannot be listed.
    """
    root = Path(folder)
    if root.is_file() and root.suffix.lower() in SUFFIXES:
        return PictureFolder(root.parent, (root,), (), None, Counter())
    if not root.is_dir():
        raise InputError(f"no folder at '{root}'; expected a folder of images")
    left_out: Counter[str] = Counter()
    loose, inside = _listed(root, left_out)
    if not inside:
        if not loose:
            raise InputError(_nothing_in(f"'{root}'", left_out))
        return PictureFolder(root, tuple(loose), (), None, left_out)
    if loose:
        raise InputError(
            f"'{root}' has images beside its class folders, such as '{loose[0].name}'; expected either images or "
            f"one folder per class ('{inside[0].name}', ...)"
        )
    found = [_below(sub, root, left_out) for sub in inside]
    if empty := [f"'{sub.name}'" for sub, files in zip(inside, found, strict=True) if not files]:
        raise InputError(_nothing_in(f"{', '.join(empty)} of '{root}'", left_out))
    labels = np.repeat(np.arange(len(inside)), [len(files) for files in found])
    files = tuple(path for files in found for path in files)
    return PictureFolder(root, files, tuple(sub.name for sub in inside), labels, left_out)


def read_folder(folder: str | os.PathLike[str], channels: int, size: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Every picture below a folder -> (N, channels, size, size) uint8, and their relative names.

    Raises InputError for an unreadable image, one of another size, a channel count that is not 1 or 3, or no image.
    """
    found = list_pictures(folder)
    return found.read(PictureReader(channels, size, fit=False)), found.names


def _below(folder: Path, root: Path, left_out: Counter[str]) -> list[Path]:
    """The pictures at any depth, in order. A link may lead anywhere, also to where the walk has been."""
    seen, ahead, found = {_identity(root)}, [folder], []
    while ahead:
        here = ahead.pop()
        if (identity := _identity(here)) in seen:
            left_out["folders reached a second time by a link"] += 1
            continue
        seen.add(identity)
        files, inside = _listed(here, left_out)
        found += files
        ahead += inside
    return sorted(found)


def _listed(folder: Path, left_out: Counter[str]) -> tuple[list[Path], list[Path]]:
    """The pictures and the folders in a folder itself, in order; counts what is neither."""
    files, inside = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be listed ({error.strerror}); expected a folder of images") from None
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name in _NOT_OURS:
            left_out["hidden or left by tools"] += 1
        elif os.path.isdir(entry):  # also False for a link to itself, where DirEntry.is_dir() raises
            inside.append(folder / entry.name)
        elif suffix not in SUFFIXES:
            left_out[suffix or "without a suffix"] += 1
        elif os.path.isfile(entry):
            files.append(folder / entry.name)
        else:
            left_out["links to nothing, or no files"] += 1
    return files, inside


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))


def _nothing_in(where: str, left_out: Counter[str]) -> str:
    what = f"; left out: {_counted(left_out)}" if left_out else ""
    return f"no images in {where}{what}; expected files ending in {', '.join(SUFFIXES)}"
