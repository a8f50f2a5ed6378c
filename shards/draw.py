"""A shard, drawn and written whole, in each format; then its record. docs/SCALE.md says what the formats hold."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..runtime.errors import MachineError
from ..runtime.files import replacing, replacing_folder
from ..runtime.flow import Flow
from ..runtime.image import png, to_uint8
from ..runtime.machine import processor
from ..runtime.request import Resolved
from ..runtime.samples import Progress, Report, Samples, Watch
from .folder import check_claim
from .job import Job, Shard
from .record import Record, measure, write_record


def draw(
    flow: Flow, job: Job, shard: Shard, folder: Path, progress: Callable[[Progress], None] | None = None
) -> Record:
    """Draw a shard, write it, then its record. Raises what ``Flow.draw`` raises, MachineError for a full disk and for
    a folder that is not, or no longer, the job's.
    """
    part = job.part(shard)
    samples = flow.draw(part, watch=Watch(progress))
    check_claim(folder, job)  # the driver may be gone, and the folder another's, while this worker lived on
    path = folder / job.name(shard)
    _write(path, job, part, samples)
    digest, size = measure(path)
    check_claim(folder, job)
    record = _record(job, shard, samples.report, digest, size)
    write_record(folder, shard, record)
    return record


def _record(job: Job, shard: Shard, report: Report, digest: str, size: int) -> Record:
    return Record(
        job=job.hash,
        name=job.name(shard),
        first_sample=shard.first,
        samples=shard.samples,
        sha256=digest,
        size=size,
        certificate=report.largest_certificate,
        nonfinite=report.nonfinite,
        uncertified=report.uncertified,
        suspects=report.suspects,
        suspect_above=report.suspect_above,
        log_prob=None if report.log_prob is None else tuple(map(_number, report.log_prob)),
        redrawn=report.redrawn,
        engine=f"{report.backend}, {processor()}",
        level=report.level,
    )


def _number(value: float) -> float | None:
    """As JSON has it: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def _write(path: Path, job: Job, part: Resolved, samples: Samples) -> None:
    if job.format == "png":
        with replacing_folder(path, force=True, marker=None) as partial:
            for name, picture in _pictures(part, samples):
                (partial / name).write_bytes(picture)
            if len(list(partial.iterdir())) != part.n:
                raise MachineError(f"'{path}': pictures vanished while they were written; run the same command again")
        return
    if path.is_dir():  # something else took the name; the shard is ours to write
        shutil.rmtree(path)
    with replacing(path) as file:
        if job.format == "npy":
            np.save(file, np.asarray(samples))
        elif job.format == "safetensors":
            _write_safetensors(file, job, part, samples)
        else:
            _write_tar(file, part, samples)


def _write_safetensors(file: BinaryIO, job: Job, part: Resolved, samples: Samples) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Any] = {
        "images": np.asarray(samples),
        "labels": part.classes(),
        "samples": np.arange(part.first_sample, part.first_sample + part.n, dtype=np.int64),
    }
    if samples.certificate is not None and samples.log_prob is not None:
        tensors |= {"certificate": samples.certificate, "log_prob": samples.log_prob}
    file.write(save(tensors, {"tarflow.job": job.hash}))  # one key: several have no fixed order


def _write_tar(file: BinaryIO, part: Resolved, samples: Samples) -> None:
    """Members NAME.png, NAME.cls (the label) and NAME.json a sample, of no owner and no time, as webdataset reads."""
    certificate, log_prob, labels = samples.certificate, samples.log_prob, part.classes().tolist()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, (name, picture) in enumerate(_pictures(part, samples)):
            about = {
                "seed": part.seed,
                "sample": part.first_sample + i,
                "label": labels[i],
                "certificate": None if certificate is None else _number(certificate[i]),
                "log_prob": None if log_prob is None else _number(log_prob[i]),
            }
            stem = name.removesuffix(".png")
            for member, content in (
                (name, picture),
                (f"{stem}.cls", str(labels[i]).encode()),
                (f"{stem}.json", json.dumps(about).encode()),
            ):
                entry = tarfile.TarInfo(member)  # mtime 0, owner 0, mode 644
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _pictures(part: Resolved, samples: Samples) -> Iterator[tuple[str, bytes]]:
    """Names by sample index and PNG files; 19 digits, so that they sort."""
    for i, image in enumerate(to_uint8(samples)):
        yield f"{part.first_sample + i:019}.png", png(image.transpose(1, 2, 0), {})
