"""Records of finished shards: one small file each, with the shard's SHA-256. What has none is drawn (again)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.document import Reader
from ..runtime.errors import BundleError
from ..runtime.files import replacing, sha256
from .job import Job, Shard, document

RECORDS = "records"
LARGEST = 64 << 20  # bytes of a record, or a job


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard. ``certificate`` is the largest of its samples, None if none was asked for; ``uncertified``
    are finite samples that overflow when they are encoded again, ``suspects`` those whose certificate is above
    ``suspect_above`` or not finite, ``log_prob`` holds the log-density of each raw sample in nats, None where it is not
    finite, or is None where no certificate was asked for. Records written earlier say nothing of the three: (), None.

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
    suspects: tuple[int, ...]
    suspect_above: float | None
    redrawn: tuple[int, ...]
    engine: str
    level: str
    log_prob: tuple[float | None, ...] | None = None


def write_record(folder: Path, shard: Shard, record: Record) -> None:
    """Write the record of a shard that is there."""
    with replacing(_path(folder, shard)) as file:
        file.write(document(asdict(record)).encode())


def finished(folder: Path, job: Job, shard: Shard) -> Record | None:
    """The record of a shard that is there, whole and of this job; None if it has to be drawn (again)."""
    try:
        record = _read(_path(folder, shard))
        of_it = (job.hash, job.name(shard), shard.first, shard.samples)
        if (record.job, record.name, record.first_sample, record.samples) != of_it:
            return None
        return record if measure(folder / record.name) == (record.sha256, record.size) else None
    except (OSError, BundleError):
        return None


def measure(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a shard as it lies on disk; see :class:`Record`."""
    if path.is_file():
        return sha256(path), path.stat().st_size
    files = sorted(path.iterdir())
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest(), sum(file.stat().st_size for file in files)


def _path(folder: Path, shard: Shard) -> Path:
    return folder / RECORDS / f"shard-{shard.number:06}.json"


def _read(path: Path) -> Record:
    """Raises BundleError for what is no record."""
    reader = Reader(str(path), "record", "its shard is drawn again")
    found = reader.read(path, LARGEST)
    read: dict[str, Any] = {name: reader.get(found, name, str) for name in ("job", "name", "sha256", "engine", "level")}
    read |= {name: reader.integers(found, name, 0) for name in ("nonfinite", "uncertified", "redrawn")}
    limit = reader.number(found, "suspect_above", 0) if found.get("suspect_above") is not None else None
    samples = reader.natural(found, "samples", 1)
    log_prob = found.get("log_prob")
    if log_prob is not None:
        listed = reader.typed(log_prob, list, "'log_prob'")
        log_prob = tuple(x if x is None else reader.number({"log_prob": x}, "log_prob") for x in listed)
        if len(log_prob) != samples:
            raise reader.wrong(f"'log_prob' has {len(log_prob)} numbers for {samples} samples")
    return Record(
        **read,
        suspects=reader.integers(found, "suspects", 0) if "suspects" in found else (),
        suspect_above=limit,
        first_sample=reader.natural(found, "first_sample", 0),
        samples=samples,
        log_prob=log_prob,
        size=reader.natural(found, "size", 0),
        certificate=None if found.get("certificate", 0) is None else reader.number(found, "certificate", 0),
    )
