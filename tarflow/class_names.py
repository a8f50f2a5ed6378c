"""What the classes of a checkpoint are called: one name a line in a file, which training leaves beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from .config import Hints
from .runtime.errors import InputError
from .runtime.hub import CLASS_NAMES
from .runtime.manifest import MANIFEST, UNPRINTABLE, read_manifest

_log = logging.getLogger(__name__)
_LARGEST = 4 << 20  # bytes; a thousand names are some twenty thousand


def beside(checkpoint: str | os.PathLike[str]) -> Path:
    """Where training leaves the names: a state dict has no place for them."""
    return Path(checkpoint).with_suffix(CLASS_NAMES)


def lines(names: Sequence[str]) -> bytes:
    """The file of names, which are those of folders: what no name may have in it becomes a question mark."""
    return "".join(f"{UNPRINTABLE.sub('?', name)}\n" for name in names).encode()


def class_names_of(checkpoint: str | os.PathLike[str], classes: int, hints: Hints | None) -> tuple[str, ...]:
    """A name for each of so many classes, or none at all: those of the file that ``hints`` name, else of a bundle, else
    of the file beside the checkpoint, which is logged. Raises InputError for a file that holds no such names.
    """
    if hints is not None and hints.class_names is not None:
        return _read(Path(hints.class_names), classes)
    manifest, found = Path(checkpoint) / MANIFEST, beside(checkpoint)
    if manifest.is_file():
        return read_manifest(manifest.read_bytes(), str(manifest)).class_names
    if not classes or not found.is_file():
        return ()
    names = _read(found, classes)
    _log.warning("the names of the classes are those in '%s'", found)
    return names


def _read(path: Path, classes: int) -> tuple[str, ...]:
    expected = f"a file with a name a line in UTF-8, {classes} in all"
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST).rstrip()
        names = tuple(line.strip() for line in content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise InputError.of("class_names", f"'{path}', which is not UTF-8", expected) from None
    except OSError as error:
        found = f"'{path}', which cannot be read ({error.strerror})"
        raise InputError.of("class_names", found, expected) from None
    if len(names) != classes:
        none = "" if classes else "this model is unconditional"
        raise InputError.of("class_names", f"'{path}', with {len(names)} lines", expected, none)
    for k, name in enumerate(names):
        if not name or UNPRINTABLE.search(name):
            raise InputError.of("class_names", f"'{path}', whose line {k + 1} is {name[:40]!r}", "text on every line")
    return names
