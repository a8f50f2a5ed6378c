"""Writing whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, MachineError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and leaves no trace when it does not.

    Raises InputError if the folder does not exist, MachineError when the disk is full or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder of '{path}' does not exist; create it first: mkdir -p '{path.parent}'")
    with disk_errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_umask())  # mkstemp is private; a result is as shared as its user says
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], force: bool, marker: str = "manifest.json") -> Iterator[Path]:
    """A folder that appears at ``path`` whole when the block ends well; a failure leaves what was there before.

    Raises InputError if ``path`` exists and ``force`` is not given, or is a folder of something else: neither empty
    nor with the file ``marker`` in it.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        if not force:
            raise InputError(f"'{path}' exists; pass --force to replace it, or another name with -o")
        ours = path.is_dir() and not path.is_symlink() and ((path / marker).is_file() or not any(path.iterdir()))
        if not ours:
            raise InputError(
                f"'{path}' was not made by this command, so --force does not replace it; choose another name"
            )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield partial
            for file in partial.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            partial.chmod(0o777 & ~_umask())
            _swap(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, path: Path) -> None:
    """Rename ``partial`` to ``path``; a folder already there steps aside first and is removed last."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors about writing ``path`` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"the disk is full: '{path}' was not written, nothing was left behind; free some space"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise MachineError(
                f"'{error.filename or path}': {error.strerror}; choose a place you can write to"
            ) from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
