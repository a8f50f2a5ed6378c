"""What a finished folder of shards holds, read back, in each format, a shard at a time."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.claims import read_npy
from ..runtime.document import Reader
from ..runtime.errors import BundleError, CheckFailed, InputError
from ..runtime.picture import PictureReader
from .folder import INDEX, JOB
from .job import PICTURES
from .record import LARGEST, measure

_ADVICE = "draw into the folder again"


def is_drawn(folder: Path) -> bool:
    """Whether a folder is one that shards were drawn into, finished or not."""
    return (folder / JOB).is_file() or (folder / INDEX).is_file()


def read_shards(folder: Path, image: tuple[int, int, int]) -> Iterator[NDArray[Any]]:
    """The images (n, channels, size, size) of each shard, in order: float32 in [-1, 1] units, or uint8 where pictures
    were drawn; ``image`` is the shape of one.

    Raises InputError for a folder that is not finished and for images of another shape, CheckFailed for samples that
    are not finite, BundleError for shards that are not those of the index.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"'{folder}' is not finished: draw what is missing first, by the command that began it")
    reader = Reader(str(folder / INDEX), "index", _ADVICE)
    index = reader.versioned(folder / INDEX, LARGEST, "tarflow-shards", 1)
    form = reader.get(reader.get(index, "job", dict), "format", str)
    if broken := reader.integers(index, "nonfinite", 0):
        raise CheckFailed(f"{len(broken)} samples in '{folder}' are not finite, the first {broken[0]}: guide less")
    for entry in reader.get(index, "shards", list):
        shard = reader.typed(entry, dict, "a shard")
        path = folder / reader.confined(reader.get(shard, "name", str))
        said = reader.get(shard, "sha256", str), reader.natural(shard, "size", 0)
        if not path.exists() or measure(path) != said:
            raise BundleError(f"'{path}' is not the shard that the index names: {_ADVICE}")
        found = _images(path, form, image)
        if found.shape != (reader.natural(shard, "samples", 1), *image):
            raise InputError(f"'{path}' holds {found.shape}; expected (N, {', '.join(map(str, image))})")
        yield found


def _images(path: Path, form: str, image: tuple[int, int, int]) -> NDArray[Any]:
    """The images of one shard, whose bytes are known to be right."""
    if form in PICTURES:
        pictures = _members(path) if form == "tar" else [file.read_bytes() for file in sorted(path.iterdir())]
        reader = PictureReader(image[0], image[1], fit=False)
        return np.stack([reader.read(picture).pixels for picture in pictures])
    if form == "npy":
        return read_npy(path)
    from safetensors.numpy import load

    return load(path.read_bytes())["images"]


def _members(path: Path) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        found = [archive.extractfile(member) for member in archive if member.name.endswith(".png")]
        return [file.read() for file in found if file is not None]
