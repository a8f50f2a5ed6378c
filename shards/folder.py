"""The folder of a job: claimed by one run at a time, free of half files, the index last.

It holds ``job.json`` (what is drawn), the shards, ``records/`` and, once all are there, ``index.json``. Every byte is a
function of the job and the kind of machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..runtime.document import Reader
from ..runtime.errors import BundleError, InputError, MachineError, briefly
from ..runtime.files import disk_errors, replacing
from ..runtime.hidden import is_open_as, lock, remove
from ..runtime.moves import LOST_AND_FOUND
from .job import SCHEMA, Job, document
from .record import LARGEST, RECORDS, Record

JOB, INDEX, LOCK = "job.json", "index.json", ".lock"
_UNFINISHED = re.compile(r"\.(shard-\d+|job\.json|index\.json)\.\S+")


@contextlib.contextmanager
def claimed(folder: Path, job: Job) -> Iterator[None]:
    """The folder as this job's own while the block runs: made, or found to hold this job, and free of half files.

    A folder in which nothing was finished is removed again if this made it. Raises InputError for a folder that holds
    another job or other files, or that another run is writing to; MachineError if it cannot be written.
    """
    fresh = not folder.exists()
    _refuse_strangers(folder, job)
    with disk_errors(folder):
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder) as alone:
            _refuse_strangers(folder, job)  # again: nobody else changes it from here on
            if alone:
                _sweep(folder)
            if not _holds(folder, job):
                with replacing(folder / JOB) as file:
                    file.write(job.text)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # it may have been removed meanwhile
                    if alone:
                        _sweep(folder)
                    if fresh and not any((folder / RECORDS).iterdir()):
                        (folder / RECORDS).rmdir()
                        (folder / JOB).unlink(missing_ok=True)
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # unless something is in it
                folder.rmdir()


def recorded(folder: Path) -> dict[str, Any] | None:
    """The job in a folder, as its file has it; None if there is none. Raises InputError if it cannot be read."""
    path = folder / JOB
    if not path.is_file():
        return None
    reader = Reader(str(path), "job", "choose another folder")
    try:
        job: dict[str, Any] = reader.get(reader.read(path, LARGEST), "job", dict)
        if "engine" in job:
            reader.get(job, "engine", str)
    except BundleError as error:
        raise InputError(
            f"this version cannot read the job in '{folder}' ({briefly(error)}); choose another folder, or remove it"
        ) from None
    return job


def check_claim(folder: Path, job: Job) -> None:
    """Raise MachineError unless ``folder`` is the job's as seen from here: a worker may be on another machine."""
    if not _holds(folder, job):
        raise MachineError(f"'{folder}' is not the folder that the job writes to: put it where every machine sees it")


def forget_index(folder: Path) -> None:
    """Remove the index: what it lists is no longer all there."""
    with disk_errors(folder / INDEX):
        (folder / INDEX).unlink(missing_ok=True)


def write_index(folder: Path, job: Job, records: Sequence[Record]) -> dict[str, Any]:
    """Write ``index.json`` over all shards, in order; return what it says. Every sample is there exactly once."""
    expected = [(job.name(shard), shard.first, shard.samples) for shard in job.shards()]
    if [(record.name, record.first_sample, record.samples) for record in records] != expected:
        raise BundleError(f"'{folder}': the records do not cover the job once; run the same command again")
    engines = sorted({record.engine for record in records})
    level = records[0].level
    if len(engines) > 1:
        level = f"L2: drawn on {len(engines)} kinds of machine; noise the same to the bit, samples to rounding"
    listed = ("name", "first_sample", "samples", "sha256", "size", "certificate")
    content = {
        "format": "tarflow-shards",
        "schema": SCHEMA,
        "job": job.content,
        "job_hash": job.hash,
        "samples": sum(record.samples for record in records),
        "certificate": max((r.certificate for r in records if r.certificate is not None), default=None),
        "nonfinite": [i for record in records for i in record.nonfinite],
        "uncertified": [i for record in records for i in record.uncertified],
        "suspects": [i for record in records for i in record.suspects],
        "suspect_above": max((r.suspect_above for r in records if r.suspect_above is not None), default=None),
        "redrawn": [i for record in records for i in record.redrawn],
        "engines": engines,
        "level": level,
        "shards": [{name: getattr(record, name) for name in listed} for record in records],
    }
    text = document(content).encode()
    path = folder / INDEX
    if not path.is_file() or path.read_bytes() != text:
        with replacing(path) as file:
            file.write(text)
    return content


def _refuse_strangers(folder: Path, job: Job) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"'{folder}' is a file; expected the name of a folder for the shards")
    other = recorded(folder)
    if other is None:
        ours = (RECORDS, LOST_AND_FOUND)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in ours)
        if names:
            raise InputError(
                f"'{folder}' holds other files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); expected "
                "an empty folder or one that this job began: choose another"
            )
        return
    begun = (folder / RECORDS).is_dir() and any((folder / RECORDS).glob("shard-*.json"))
    if begun and not _holds(folder, job):
        found = job.differences(other) or ["it was written by another version"]
        raise InputError(
            f"'{folder}' holds another job: {'; '.join(found[:4])}. To continue that one, give its options (they are "
            f"in '{folder / JOB}'); for this one, choose another folder, or remove this one: rm -r '{folder}'"
        )


def _holds(folder: Path, job: Job) -> bool:
    """Whether the folder's job is this one, to the byte."""
    try:
        if not (folder / JOB).is_file():
            return False
        with (folder / JOB).open("rb") as file:
            return file.read(len(job.text) + 1) == job.text
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the folder while the block runs; a process that dies lets go of it. Yields whether nobody else can be in it:
    not where the file system has no locks. There, two runs write the same bytes, at worst twice.
    """
    path = folder / LOCK  # a file, not the folder: network file systems lock files alone
    while True:
        with disk_errors(folder):
            descriptor = _open_to_lock(path)
        if descriptor is None:
            yield False
            return
        try:
            alone = _lock(descriptor, folder)
            if is_open_as(path, descriptor):
                try:
                    yield alone
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()  # while it is held: whoever opened this very file looks again
                return
        finally:
            os.close(descriptor)


def _open_to_lock(path: Path) -> int | None:
    """None where nothing can be written: what is finished there can be read all the same."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return None


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether a lock could be taken. Raises InputError if another run has it."""
    alone = lock(descriptor)
    if alone is False:
        raise InputError(f"another run is writing to '{folder}'; wait for it or stop it: what it finishes is kept")
    return bool(alone)


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for place in (folder, folder / RECORDS):
        for path in place.iterdir() if place.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name):
                remove(path)
