"""Copies in the making: hidden folders beside what they become, each locked by its writer for as long as that lives."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

OLD = "old"  # in a hidden folder: what was moved out of the way, under its name
_LOCK = "lock"
HIDDEN = re.compile(r"\..+\.tarflow-[a-z0-9_]{8}")  # the last part is tempfile's
_OLD_AGE = 7 * 24 * 3600  # seconds, after which a writer is taken for dead where locks say nothing


@contextlib.contextmanager
def hidden(path: Path) -> Iterator[Path]:
    """A folder to make ``path`` in, gone after the block. What killed runs left beside it is swept first."""
    import tempfile  # most runs only read

    place = _near(path.absolute())
    _sweep(place)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path.name, place), dir=place))
        descriptor = _held(folder)
        if descriptor is not None:
            break
    try:
        yield folder
    finally:
        if (folder / _LOCK).exists():
            _remove(folder)
        os.close(descriptor)


def keep(finished: Path) -> Path:
    """Let what was made in a hidden folder outlive it: under this name."""
    folder = finished.parent
    kept = folder.with_name(folder.name[1:])
    try:
        finished.rename(kept)
    except OSError:  # not even here: what has no lock is nobody's to sweep
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
        return finished
    return kept


def restore(path: Path) -> None:
    """Put back what a killed run moved out of the way of ``path``, if nothing took its place."""
    if not os.path.lexists(path):
        for folder in _inside(path.parent):
            with _orphaned(folder) as left:
                if left:
                    _put_back(folder)


def left_in(folder: Path) -> list[Path]:
    """The hidden folders there whose writers are gone."""
    found = []
    for inside in _inside(folder):
        with _orphaned(inside) as left:
            found += [inside] * left
    return found


def lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed: whether that was to be had, None where the system knows no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def is_open_as(path: Path, descriptor: int) -> bool:
    """Whether a file is still the one that was opened: its last holder may have removed it since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _near(path: Path) -> Path:
    """Where a rename may be all that is left to do: beside ``path``, or in it, if it is a disk of its own."""
    beside = os.access(path.parent, os.W_OK)
    if path.is_dir():
        return path.parent if beside and not os.path.ismount(path) else path
    if path.exists() and not beside and os.access(path, os.W_OK):  # a file mounted where no other may be
        import tempfile

        return Path(tempfile.gettempdir())
    return path.parent


def _prefix(name: str, place: Path) -> str:
    """The beginning of a hidden folder's name, cut where the file system ends a name."""
    try:
        most = os.pathconf(place, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        most = 255
    while len(os.fsencode(name)) > most - len("..tarflow-") - 8:
        name = name[:-1]
    return f".{name}.tarflow-"


def _held(folder: Path) -> int | None:
    """A descriptor that holds a new hidden folder; None if it was swept before that."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        folder.rmdir()
        raise
    if lock(descriptor) is not False and is_open_as(folder / _LOCK, descriptor):
        return descriptor
    os.close(descriptor)
    return None


@cache  # once a process: a folder of many shards is long to read
def _sweep(place: Path) -> None:
    for folder in _inside(place):
        with _orphaned(folder) as left:
            if left:
                _put_back(folder)
                _remove(folder)
        with contextlib.suppress(OSError):  # killed before it was locked, or after
            folder.rmdir()


def _inside(place: Path) -> list[Path]:
    """Hidden folders of ours, whoever writes there."""
    try:
        return [place / name for name in os.listdir(place) if HIDDEN.fullmatch(name)]
    except OSError:
        return []


@contextlib.contextmanager
def _orphaned(folder: Path) -> Iterator[bool]:
    """Whether a hidden folder's writer is gone. While the block runs nobody else finds it so."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        alone = lock(descriptor)
        yield time.time() - os.fstat(descriptor).st_mtime > _OLD_AGE if alone is None else alone
    finally:
        os.close(descriptor)


def _put_back(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for old in (folder / OLD).iterdir():
            if not os.path.lexists(folder.parent / old.name):
                old.rename(folder.parent / old.name)


def _remove(folder: Path) -> None:
    """The lock last, so that a removal that is cut off is gone on with."""
    with contextlib.suppress(OSError):
        for inside in folder.iterdir():
            if inside.name != _LOCK:
                remove(inside)
        (folder / _LOCK).unlink()
        folder.rmdir()


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, as far as that can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
