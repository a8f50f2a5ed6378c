"""What a file says of itself, held against what it holds, before anything is made of the size it says."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import size_text
from .manifest import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SQUEEZED = 8  # times its size: what an archive of numbers may become; honest ones stay below 2
_SMALL = 1 << 20  # bytes that nobody minds
Shape = tuple[int, ...]


def unsupported(config: ModelShape, shapes: Mapping[str, Shape]) -> str | None:
    """What a configuration says that weights of these shapes, by their names in a bundle, do not bear out; or None."""
    for name, expected in _expected(config):
        found = shapes.get(name)
        if expected != (None if found is None else found[: len(expected or found)]):
            return f"{name} is {found or 'not there'}; the configuration says {expected or 'nothing'}"
    return None


def _expected(config: ModelShape) -> Iterator[tuple[str, Shape | None]]:
    """Names of weights and how their shapes begin, None for one that is not there; each number is in one."""
    yield "var", (config.tokens, config.patch_dim)
    for k in range(config.blocks):
        layer = "blocks.{}.attn_blocks.{}.attention.norm.weight"
        yield f"blocks.{k}.pos_embed", (config.tokens, config.width)
        yield f"blocks.{k}.class_embed", (config.classes,) if config.classes else None
        yield layer.format(k, config.layers - 1), (config.width,)
        yield layer.format(k, config.layers), None
    yield f"blocks.{config.blocks}.pos_embed", None


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a zip archive whose members say that they are far larger than all of it."""
    with zipfile.ZipFile(path) as archive:
        said = sum(member.file_size for member in archive.infolist())
    check_size(said, path)


def check_size(said: int, path: str | os.PathLike[str]) -> None:
    """Raise ValueError if what a file is to become, in bytes, is far more than it has."""
    held = os.path.getsize(path)
    if said > _SQUEEZED * held + _SMALL:
        raise ValueError(f"it has {size_text(held)}, and says that it holds {size_text(said)}")


def read_npz(path: Path, name: str) -> NDArray[Any]:
    """An array of a .npz file, never unpickled. Raises OSError, and ValueError for a file that holds none so called."""
    import numpy as np

    with _damage_told():
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            if name not in file:
                raise ValueError(f"it holds no '{name}'")
            found: NDArray[Any] = file[name]
            return found


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file, never unpickled. Raises OSError, and ValueError for a file that holds none whole."""
    import numpy as np

    with path.open("rb") as file:
        start = file.read(6)
    if start[:2] == b"PK":
        raise ValueError("it is an archive of several arrays")
    if start != b"\x93NUMPY":
        raise ValueError("it does not begin as one does")
    with _damage_told():  # mapped: numpy compares the size it says with the file's
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))


@contextmanager
def _damage_told() -> Iterator[None]:
    """A ValueError of one line for whatever a damaged file makes numpy, zipfile and Python's parser raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None
