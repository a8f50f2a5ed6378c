"""Finished files and folders take their places: by a rename where the file system has one, else by a copy."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .hidden import OLD, remove

LOST_AND_FOUND = "lost+found"  # on every fresh disk of some file systems
# Mount points, overlays' lower layers, folders of others, and a rename of a folder into itself.
_REFUSED = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EINVAL)
_FATAL = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def put(source: Path, path: Path) -> None:
    """A file takes the place of ``path``: at once, or where that is refused, copied into what is there."""
    if not _moved(source, path):
        _tell(path)
    sync(path.parent)


def put_folder(source: Path, path: Path, last: str | None) -> None:
    """A folder in a hidden one takes the place of ``path``. Where no rename can do that, its files move one by one, the
    one called ``last`` last, and half of the old one until then: what is cut off is refused by whoever opens it.
    """
    try:
        if not path.exists():
            source.rename(path)
        elif not _exchange(source, path):
            _step_aside(source, path)
    except OSError as error:
        if error.errno not in _REFUSED or not path.is_dir():
            raise
        _tell(path)
        _fill(source, path, last)
    sync(path.parent)


def finish(file: Path, mode: int) -> None:
    """Make a finished file last, and as shared as its user says: some libraries make it private."""
    sync(file)
    with _where_possible():
        file.chmod(mode)


def sync(path: Path) -> None:
    """Make what a file holds, or renames in a folder, last beyond a power failure, where the file system can."""
    with _where_possible():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _where_possible() -> Iterator[None]:
    """What a file system does not offer is done without; what says that data is lost is an error."""
    try:
        yield
    except OSError as error:
        if error.errno in _FATAL:
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step, which Linux can on most file systems; whether it did."""
    import ctypes

    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _step_aside(source: Path, path: Path) -> None:
    """The old folder moves to where the next command that names it would find it, if this is killed in between."""
    old = source.parent / OLD / path.name
    old.parent.mkdir()
    path.rename(old)
    try:
        source.rename(path)
    except BaseException:
        old.rename(path)
        raise


def _fill(source: Path, path: Path, last: str | None) -> None:
    if last is not None and (path / last).is_file():
        stub = source.parent / last
        stub.write_bytes((content := (path / last).read_bytes())[: len(content) // 2])
        _moved(stub, path / last)  # cut in half it opens nothing, and says whose it was
        sync(path)
    for old in path.iterdir():
        if old.name not in (LOST_AND_FOUND, source.parent.name, last):
            remove(old)
    moved = []
    try:
        for new in sorted(source.iterdir(), key=lambda new: new.name == last):
            moved += [new] * _moved(new, path / new.name)
    except OSError:
        for new in moved:  # so that what was made stays together
            (path / new.name).rename(new)
        raise
    sync(path)


def _moved(source: Path, path: Path) -> bool:
    """Whether a rename could do it; else it is copied, into a file that may be a mount point itself."""
    try:
        source.replace(path)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        if source.is_dir():
            shutil.copytree(source, path, symlinks=True)
        else:
            shutil.copyfile(source, path)
            sync(path)
        return False
    return True


def _tell(path: Path) -> None:
    import logging  # most runs have nothing to tell

    logging.getLogger("tarflow").warning(
        "'%s' cannot be replaced at once, as it is a mount point or its file system refuses: what was there is written "
        "over, and until that is done nothing whole is there",
        path,
    )
