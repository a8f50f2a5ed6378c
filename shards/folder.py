"""Shards on disk: drawn and written whole, recorded with their SHA-256, found again after a stop; the index last.

A folder of shards holds ``job.json`` (what is drawn), the shards, ``records/`` (one small file a finished shard) and,
once all are there, ``index.json``. Every byte is a function of the job and the kind of machine. See docs/SCALE.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..runtime.errors import BundleError, InputError, MachineError
from ..runtime.files import disk_errors, replacing, replacing_folder, sha256
from ..runtime.flow import Flow, Progress, Samples
from ..runtime.image import png, to_uint8
from ..runtime.machine import processor
from .job import SCHEMA, Job, Shard, document

JOB, INDEX, RECORDS, LOCK = "job.json", "index.json", "records", ".lock"
_UNFINISHED = re.compile(r"\.(shard-\d+|job\.json|index\.json)\.\S+")
_LARGEST = 64 << 20  # bytes of a job or a record


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard. ``certificate`` is the largest of its samples, None if none was asked for; ``uncertified``
    are finite samples that overflow when they are encoded again.

    ``sha256`` and ``size`` are the file's. Of a folder of pictures: the SHA-256 of what ``sha256sum *`` prints in it,
    and the sum of the sizes.
    """

    job: str
    name: str
    first_sample: int
    samples: int
    sha256: str
    size: int
    certificate: float | None
    nonfinite: tuple[int, ...]
    uncertified: tuple[int, ...]
    redrawn: tuple[int, ...]
    engine: str
    level: str


# --- one shard ---------------------------------------------------------------------------------------------------


def draw(
    flow: Flow, job: Job, shard: Shard, folder: Path, progress: Callable[[Progress], None] | None = None
) -> Record:
    """Draw a shard, write it, then its record. Raises what ``Flow.sample`` raises, MachineError for a full disk and for
    a folder that is not, or no longer, the job's.
    """
    samples = flow.sample(
        shard.samples,
        labels=job.labels_of(shard),
        guidance=job.guidance,
        seed=job.seed,
        first_sample=shard.first,
        denoise=False if job.denoise is None else job.denoise,
        certify=job.certify,
        reproducible=True,
        redraw_nonfinite=job.redraw_nonfinite,
        decode=job.decode,
        tolerance=job.tolerance,
        part_of_more=True,
        progress=progress,
    )
    report = samples.report
    assert report is not None
    check_claim(folder, job)  # the driver may be gone, and the folder another's, while this worker lived on
    _write(folder / job.name(shard), job, shard, samples)
    errors = np.zeros(0) if report.certificate is None else report.certificate
    suspects = (shard.first + int(i) for i in np.flatnonzero(~np.isfinite(errors)))
    digest, size = _measure(folder / job.name(shard))
    check_claim(folder, job)
    record = Record(
        job=job.hash,
        name=job.name(shard),
        first_sample=shard.first,
        samples=shard.samples,
        sha256=digest,
        size=size,
        certificate=max(map(float, errors[np.isfinite(errors)]), default=None),
        nonfinite=report.nonfinite,
        uncertified=tuple(i for i in suspects if i not in report.nonfinite),
        redrawn=report.redrawn,
        engine=f"{report.backend}, {processor()}",
        level=report.level,
    )
    with replacing(_record_path(folder, shard)) as file:
        file.write(document(asdict(record)).encode())
    return record


def _write(path: Path, job: Job, shard: Shard, samples: Samples) -> None:
    if job.format == "png":
        with replacing_folder(path, force=True, marker=None) as partial:
            for name, picture in _pictures(shard, samples):
                (partial / name).write_bytes(picture)
            if len(list(partial.iterdir())) != shard.samples:
                raise MachineError(f"'{path}': pictures vanished while they were written; run the same command again")
        return
    if path.is_dir():  # something else took the name; the shard is ours to write
        shutil.rmtree(path)
    with replacing(path) as file:
        if job.format == "npy":
            np.save(file, np.asarray(samples))
        elif job.format == "safetensors":
            _write_safetensors(file, job, shard, samples)
        else:
            _write_tar(file, job, shard, samples)


def _write_safetensors(file: BinaryIO, job: Job, shard: Shard, samples: Samples) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Any] = {
        "images": np.asarray(samples),
        "labels": job.labels_of(shard),
        "samples": np.arange(shard.first, shard.first + shard.samples, dtype=np.int64),
    }
    assert samples.report is not None
    if samples.report.certificate is not None:
        tensors["certificate"] = samples.report.certificate
    file.write(save(tensors, {"tarflow.job": job.hash}))  # one key: several have no fixed order


def _write_tar(file: BinaryIO, job: Job, shard: Shard, samples: Samples) -> None:
    """Members NAME.png, NAME.cls (the label) and NAME.json a sample, of no owner and no time, as webdataset reads."""
    certificate = samples.report.certificate if samples.report is not None else None
    labels = job.labels_of(shard)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, (name, picture) in enumerate(_pictures(shard, samples)):
            error = None if certificate is None or not np.isfinite(certificate[i]) else float(certificate[i])
            about = {"seed": job.seed, "sample": shard.first + i, "label": int(labels[i]), "certificate": error}
            stem = name.removesuffix(".png")
            for member, content in (
                (name, picture),
                (f"{stem}.cls", str(labels[i]).encode()),
                (f"{stem}.json", json.dumps(about).encode()),
            ):
                entry = tarfile.TarInfo(member)  # mtime 0, owner 0, mode 644
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _pictures(shard: Shard, samples: Samples) -> Iterator[tuple[str, bytes]]:
    """Names by sample index and PNG files; 19 digits, so that they sort."""
    for i, image in enumerate(to_uint8(samples)):
        yield f"{shard.first + i:019}.png", png(image.transpose(1, 2, 0), {})


def _measure(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a shard as it lies on disk; see :class:`Record`."""
    if not path.is_dir():
        return sha256(path), path.stat().st_size
    files = sorted(path.iterdir())
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest(), sum(file.stat().st_size for file in files)


# --- what is finished --------------------------------------------------------------------------------------------


def finished(folder: Path, job: Job, shard: Shard) -> Record | None:
    """The record of a shard that is there, whole and of this job; None if it has to be drawn (again)."""
    try:
        record = _read_record(_record_path(folder, shard))
        if record.job != job.hash or record.name != job.name(shard):
            return None
        found = _measure(folder / record.name)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = (record.first_sample, record.samples) == (shard.first, shard.samples)
    return record if sound and found == (record.sha256, record.size) else None


def write_index(folder: Path, job: Job, records: Sequence[Record]) -> dict[str, Any]:
    """Write ``index.json`` over all shards, in order; return what it says. Every sample is there exactly once."""
    expected = [(job.name(shard), shard.first, shard.samples) for shard in job.shards()]
    if [(record.name, record.first_sample, record.samples) for record in records] != expected:
        raise BundleError(f"'{folder}': the records do not cover the job once; run the same command again")
    errors = [record.certificate for record in records if record.certificate is not None]
    engines = sorted({record.engine for record in records})
    content = {
        "format": "tarflow-shards",
        "schema": SCHEMA,
        "job": asdict(job),
        "job_hash": job.hash,
        "samples": sum(record.samples for record in records),
        "certificate": max(errors, default=None),
        "nonfinite": [i for record in records for i in record.nonfinite],
        "uncertified": [i for record in records for i in record.uncertified],
        "redrawn": [i for record in records for i in record.redrawn],
        "engines": engines,
        "level": records[0].level
        if len(engines) == 1
        else f"L2: drawn on {len(engines)} kinds of machine; noise the same to the bit, samples to rounding",
        "shards": [
            {
                "name": record.name,
                "first_sample": record.first_sample,
                "samples": record.samples,
                "sha256": record.sha256,
                "size": record.size,
                "certificate": record.certificate,
            }
            for record in records
        ],
    }
    text = document(content).encode()
    path = folder / INDEX
    if not path.is_file() or path.read_bytes() != text:
        with replacing(path) as file:
            file.write(text)
    return content


def _record_path(folder: Path, shard: Shard) -> Path:
    return folder / RECORDS / f"shard-{shard.number:06}.json"


def _read_record(path: Path) -> Record:
    content = json.loads(_read(path))
    for name in ("nonfinite", "uncertified", "redrawn"):
        content[name] = tuple(content[name])
    return Record(**content)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"'{path}' is larger than {_LARGEST >> 20} MiB")
    return text


# --- the folder --------------------------------------------------------------------------------------------------


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
            if not (folder / JOB).is_file() or _read(folder / JOB) != job.text:
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


def check_claim(folder: Path, job: Job) -> None:
    """Raise MachineError unless ``folder`` is the job's as seen from here: a worker may be on another machine."""
    path = folder / JOB
    if not path.is_file() or _read(path) != job.text:
        raise MachineError(f"'{folder}' is not the folder that the job writes to: put it where every machine sees it")


def check_space(folder: Path, needed: int) -> None:
    """Raise MachineError if the disk of ``folder``, which need not exist yet, has less room than that."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MachineError(
            f"the samples take about {needed / 1e9:.1f} GB; the disk of '{folder}' has {free / 1e9:.1f} GB left: free "
            "some, choose another --out, or --format tar, which compresses"
        )


def forget_index(folder: Path) -> None:
    """Remove the index: what it lists is no longer all there."""
    with disk_errors(folder / INDEX):
        (folder / INDEX).unlink(missing_ok=True)


def _refuse_strangers(folder: Path, job: Job) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"'{folder}' is a file; expected the name of a folder for the shards")
    path = folder / JOB
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != RECORDS)
        if names:
            raise InputError(
                f"'{folder}' holds other files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); expected "
                "an empty folder or one that this command began: choose another --out"
            )
        return
    try:
        text = _read(path)
        other = json.loads(text).get("job")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not a job this version reads ({str(error)[:80]}); choose another --out, or remove '{folder}'"
        ) from None
    begun = (folder / RECORDS).is_dir() and any((folder / RECORDS).glob("shard-*.json"))
    if text != job.text and begun:
        found = job.differences(other) or ["it was written by another version"]
        raise InputError(
            f"'{folder}' holds another job: {'; '.join(found[:4])}. To continue that one, give its options (they are "
            f"in '{path}'); for this one, choose another --out, or remove the folder: rm -r '{folder}'"
        )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the folder while the block runs; a process that dies lets go of it. Yields whether nobody else can be in it:
    not where the file system has no locks. There, two runs write the same bytes, at worst twice.
    """
    path = folder / LOCK  # a file, not the folder: network file systems lock files alone
    while True:
        with disk_errors(folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            alone = _lock(descriptor, folder)
            if _is_open_as(path, descriptor):
                try:
                    yield alone
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()  # while it is held: whoever opened this very file looks again
                return
        finally:
            os.close(descriptor)


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Whether a file is still the one that was opened: its last holder may have removed it since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether a lock could be taken. Raises InputError if another run has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another run is writing to '{folder}'; wait for it or stop it: what it finishes is kept"
        ) from None
    except OSError:
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for place in (folder, folder / RECORDS):
        for path in place.iterdir() if place.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
