"""Writing whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, MachineError

_UMASK = os.umask(0o022)  # read once: it can only be read by setting it, which other threads would see
os.umask(_UMASK)
_FORMAT = re.compile(rb'"format"\s*:\s*"tarflow-[a-z]+"')
_OURS = re.compile(r"manifest\.json|(?:weights|golden)\.safetensors|PARITY\.md|block_\d+\.[a-z]+\.onnx")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT)


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
    follows the last dot, so it is that of ``path`` and a suffix, in a hidden folder beside it.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; expected the name of a file to write")
    if path.exists() and not path.is_file():
        raise InputError(f"'{path}' is a device or a pipe; expected the name of a file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder of '{path}' does not exist; create it first: mkdir -p '{path.parent}'")
    with disk_errors(path), _hidden_beside(path) as folder:
        partial = folder / f"{path.name}.partial"
        yield partial
        _finish(partial)
        partial.replace(path)
        _sync(path.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what :func:`replacing` would raise for a place that takes no files; before a long computation."""
    with contextlib.suppress(_Unwritten), replacing(path):
        raise _Unwritten


class _Unwritten(Exception):
    """Leaves ``replacing`` without writing."""


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], force: bool, marker: str | None = "manifest.json") -> Iterator[Path]:
    """A folder that appears at ``path`` whole when the block ends well; a failure leaves what was there before.

    Raises what :func:`check_replaceable` raises; MachineError when the disk is full or not writable.
    """
    path = Path(path)
    check_replaceable(path, force, marker)
    missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _hidden_beside(path) as partial:
                yield partial
                for inside in partial.rglob("*"):
                    if not inside.is_symlink():
                        finish = _sync if inside.is_dir() else _finish
                        finish(inside)
                partial.chmod(0o777 & ~_UMASK)
                _sync(partial)
                _swap(partial, path, force)
        finally:
            for parent in missing:
                with contextlib.suppress(OSError):  # the bundle is in it
                    parent.rmdir()


@contextlib.contextmanager
def _hidden_beside(path: Path) -> Iterator[Path]:
    """A new folder that is gone at the end, unless it was renamed."""
    import tempfile  # most runs only read

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def check_replaceable(path: str | os.PathLike[str], force: bool, marker: str | None = "manifest.json") -> None:
    """Raise InputError if ``path`` exists and ``force`` is not given, or is something else: neither empty nor ours.

    Many programs have a manifest.json: the file ``marker`` must say, near its beginning, that its format is ours.
    None: whatever folder is there is the caller's.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise InputError(f"'{path}' is a folder in use; expected the name of a folder to make")
    with disk_errors(path):
        taken = path.exists() or path.is_symlink()
    if not taken:
        return
    if not force:
        raise InputError(f"'{path}' exists; use `force` to replace it, or another name", field="force")
    folder = path.is_dir() and not path.is_symlink()
    if not folder or not (marker is None or _has_format(path / marker) or _holds_only_ours(path)):
        raise InputError(f"'{path}' was not made by this command, so `force` does not replace it; choose another name")


def _holds_only_ours(folder: Path) -> bool:
    """Empty, or a bundle by its files' names, whatever became of its manifest."""
    return all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def _has_format(marker: Path) -> bool:
    try:
        with marker.open("rb") as file:
            return _FORMAT.search(file.read(4096)) is not None
    except OSError:
        return False


def _swap(partial: Path, path: Path, force: bool) -> None:
    """Rename ``partial`` to ``path``; a folder already there steps aside first and is removed last."""
    import shutil

    if not force and (path.exists() or path.is_symlink()):
        raise InputError(f"'{path}' appeared meanwhile and was kept; use `force` to replace it", field="force")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _finish(file: Path) -> None:
    """Make a finished file last, and as shared as its user says: some libraries make it private."""
    _sync(file)
    file.chmod(0o666 & ~_UMASK)


def _sync(path: Path) -> None:
    """Make what a file holds, or renames in a folder, last beyond a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or short_write:
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
