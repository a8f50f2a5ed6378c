"""Writing whole or not at all: a hidden copy, fsync, and a rename, or what comes closest to one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, MachineError
from .hidden import HIDDEN, hidden, keep, restore
from .moves import finish, put, put_folder, sync

_UMASK = os.umask(0o022)  # read once: it can only be read by setting it, which other threads would see
os.umask(_UMASK)
_FORMAT = re.compile(rb'"format"\s*:\s*"tarflow-[a-z]+"')
_OURS = re.compile(r"manifest\.json|(?:weights|golden)\.safetensors|PARITY\.md|block_\d+\.[a-z]+\.onnx|lost\+found")
_REFUSED = "EACCES EPERM EROFS ENOTDIR EISDIR EEXIST ENAMETOOLONG ENOENT EIO EINVAL EBUSY EXDEV ENOTSUP ELOOP"
_UNWRITABLE = tuple(getattr(errno, name) for name in _REFUSED.split())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and leaves no trace when it does not.

    Raises InputError if the folder does not exist, MachineError when the disk is full or not writable.
    """
    with replacing_by_name(path) as partial, partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for what opens a file itself: the name of one to write. PyTorch keeps a file's name in it, without what
    follows the last dot, so it is that of ``path`` and as much of a suffix as fits, in a hidden folder.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    with disk_errors(path):
        if not path.parent.is_dir():
            raise InputError(f"the folder of '{path}' does not exist; create it first: mkdir -p '{path.parent}'")
        found = _mode(path)
        if found is not None and stat.S_ISDIR(found):
            raise InputError(f"'{path}' is a folder; expected the name of a file to write")
        if found is not None and not stat.S_ISREG(found):
            raise InputError(f"'{path}' is a device or a pipe; expected the name of a file to write")
        with hidden(path) as folder:
            partial = folder / (path.name + ".partial"[: 255 - len(os.fsencode(path.name))])
            yield partial
            finish(partial, 0o666 & ~_UMASK)
            with _kept(partial, path):
                put(partial, path)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], force: bool, marker: str | None = "manifest.json") -> Iterator[Path]:
    """A folder that appears at ``path`` whole when the block ends well; a failure leaves what was there before.

    ``marker`` is the file that makes it one: where the folder that is there can only be written over, it is the last.
    Raises what :func:`check_replaceable` raises; MachineError when the disk is full or not writable.
    """
    path = Path(path)
    _check_taken(path, force, marker)
    missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with hidden(path) as folder:
                partial = folder / path.name
                partial.mkdir()
                yield partial
                for inside in (*partial.rglob("*"), partial):
                    if inside.is_dir():
                        sync(inside)
                    elif not inside.is_symlink():
                        finish(inside, 0o666 & ~_UMASK)
                with _kept(partial, path):
                    if not force and os.path.lexists(path):
                        raise FileExistsError(errno.EEXIST, "it appeared meanwhile")
                    put_folder(partial, path, marker)
        finally:
            for parent in missing:
                with contextlib.suppress(OSError):  # the bundle is in it
                    parent.rmdir()


@contextlib.contextmanager
def _kept(finished: Path, path: Path) -> Iterator[None]:
    """Work that is done is not lost: what cannot take its place stays, under a name that is told."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"'{path}' cannot be replaced: {error.strerror}. What was made is whole and kept as '{keep(finished)}': "
            "move it to where it is wanted"
        ) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what :func:`replacing` would raise for a place that takes no files; before a long computation."""
    with contextlib.suppress(_Unwritten), replacing(path):
        raise _Unwritten


class _Unwritten(Exception):
    """Leaves ``replacing`` without writing."""


def check_room(path: str | os.PathLike[str], needed: int, advice: str = "choose another place") -> None:
    """Raise MachineError if the disk of ``path``, which need not exist yet, has less room than so many bytes."""
    there = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    disk = shutil.disk_usage(there)
    if disk.total and needed > disk.free:
        left = f"its disk has {size_text(disk.free)} left"
        raise MachineError(f"'{path}' takes about {size_text(needed)}; {left}: free some, or {advice}")


def check_replaceable(path: str | os.PathLike[str], force: bool, marker: str | None = "manifest.json") -> None:
    """Raise InputError if ``path`` exists and ``force`` is not given, or is something else: neither empty nor ours.
    MachineError if no folder can be made there.

    Many programs have a manifest.json: the file ``marker`` must say, near its beginning, that its format is ours.
    None: whatever folder is there is the caller's.
    """
    first = Path(path)
    _check_taken(first, force, marker)
    with disk_errors(Path(path)):
        while not first.parent.exists():
            first = first.parent
        with hidden(first):
            pass


def _check_taken(path: Path, force: bool, marker: str | None) -> None:
    if path.name in ("", ".."):
        raise InputError(f"'{path}' is a folder in use; expected the name of a folder to make")
    restore(path)
    with disk_errors(path):
        taken = path.is_symlink() or _mode(path) is not None
    if not taken:
        return
    if not force:
        raise InputError(f"'{path}' exists; use `force` to replace it, or another name", field="force")
    folder = path.is_dir() and not path.is_symlink()
    if not folder or not (marker is None or _has_format(path / marker) or _holds_only_ours(path)):
        raise InputError(f"'{path}' was not made by this command, so `force` does not replace it; choose another name")


def _mode(path: Path) -> int | None:
    """What is there; None for nothing. Raises OSError for a name that cannot be."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _holds_only_ours(folder: Path) -> bool:
    """Empty, or a bundle by its files' names, whatever became of its manifest."""
    return all(_OURS.fullmatch(path.name) or HIDDEN.fullmatch(path.name) for path in folder.iterdir())


def _has_format(marker: Path) -> bool:
    try:
        with marker.open("rb") as file:
            return _FORMAT.search(file.read(4096)) is not None
    except OSError:
        return False


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors about writing ``path`` into one sentence."""
    try:
        yield
    except OSError as error:
        # numpy's ndarray.tofile says 'N requested and M written' and no errno when the disk is full.
        short_write = error.errno is None and "requested and" in str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or short_write:
            raise MachineError(
                f"the disk is full: '{path}' was not written, nothing was left behind; free some space"
            ) from None
        if error.errno in _UNWRITABLE:
            raise MachineError(
                f"'{path}' cannot be written: {error.strerror}; choose a place you can write to"
            ) from None
        raise


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
