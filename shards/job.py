"""A job: many samples of one bundle, cut into shards. What is drawn, and nothing of who draws it or how fast.

Shards follow the sample index: the k-th ends at a multiple of the shard size, itself a multiple of the tile that
reproducible sampling computes in. So a shard is a function of the job and its number. docs/SCALE.md has the format.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from ..runtime.bundle import Bundle, ModelShape
from ..runtime.errors import InputError
from ..runtime.flow import REPRODUCIBLE_TILE
from ..runtime.kept import added, kept_guidance
from ..runtime.request import Request, Resolved

FORMAT = "tarflow-job"
SCHEMA = 1
DEFAULT_SHARD = 1024
SUFFIXES = {"npy": ".npy", "safetensors": ".safetensors", "png": "", "tar": ".tar"}  # a png shard is a folder
PICTURES = ("png", "tar")
_MOST_SHARDS = 1_000_000  # their numbers have six digits
_MOST_SAMPLES = 1 << 63


@dataclass(frozen=True, slots=True)
class Shard:
    """The samples ``first ... first + samples - 1``, drawn and written together."""

    number: int
    first: int
    samples: int


@dataclass(frozen=True)
class Job:
    """The samples of a request, of the bundle with this hash, in shards of this format and size: all that fixes bytes.
    ``engine`` is what :meth:`Opening.engine` says; None: whatever each machine's ONNX Runtime or TensorRT computes.

    Shards are drawn reproducibly, whatever the request says of that and of batches. Raises InputError for what makes no
    job.
    """

    request: Resolved
    bundle: str
    format: str = "npy"
    shard_size: int = DEFAULT_SHARD
    engine: str | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        request: Request,
        format: str = "npy",
        shard_size: int = DEFAULT_SHARD,
        engine: str | None = None,
    ) -> Job:
        """The job of a request, checked against the bundle's model. Raises InputError for one that it cannot draw."""
        shape = bundle.manifest.config
        job = cls(request.resolved(shape), bundle.hash, format, shard_size, engine)
        if format in PICTURES and shape.channels not in (1, 3):
            why = f"pictures have 1 or 3 channels; this model has {shape.channels}"
            raise InputError.of("format", f"'{format}'", "npy or safetensors", why)
        return job

    def __post_init__(self) -> None:
        first, n = self.request.first_sample, self.request.n
        if first + n > _MOST_SAMPLES:  # their indices are written as int64
            raise InputError.of("first_sample", first, f"at most 2^63 - {n} for {n} samples in shards")
        if self.format not in SUFFIXES:
            raise InputError.of("format", f"'{self.format}'", f"one of {', '.join(SUFFIXES)}")
        if self.shard_size < 1 or self.shard_size % REPRODUCIBLE_TILE:
            near = max(1, round(self.shard_size / REPRODUCIBLE_TILE)) * REPRODUCIBLE_TILE
            multiple = f"a multiple of {REPRODUCIBLE_TILE}, the rows that are computed together, such as {near}"
            raise InputError.of("shard_size", self.shard_size, multiple)
        if self._count > _MOST_SHARDS:
            least = -(-n // (_MOST_SHARDS - 1))
            enough = f"{-(-least // REPRODUCIBLE_TILE) * REPRODUCIBLE_TILE} or more for {n} samples"
            raise InputError.of("shard_size", self.shard_size, enough, f"a job has {_MOST_SHARDS} shards at most")

    @property
    def _count(self) -> int:
        first = self.request.first_sample
        return (first + self.request.n - 1) // self.shard_size - first // self.shard_size + 1

    def shards(self) -> list[Shard]:
        """All shards, in order: the first and the last may be shorter than the others."""
        size, start = self.shard_size, self.request.first_sample
        end = start + self.request.n
        edges = [start, *range((start // size + 1) * size, end, size), end]
        return [Shard(number, first, after - first) for number, (first, after) in enumerate(pairwise(edges))]

    def name(self, shard: Shard) -> str:
        """The name of a shard's file, or of its folder."""
        return f"shard-{shard.number:06}{SUFFIXES[self.format]}"

    def part(self, shard: Shard) -> Resolved:
        """What is drawn for a shard."""
        return replace(self.request.part(shard.first, shard.samples), reproducible=True, batch_size=None)

    @cached_property
    def content(self) -> dict[str, Any]:
        """The job as JSON has it. Its keys and their order are the format's: finished shards name its hash."""
        request = self.request
        return {
            "bundle": self.bundle,
            "n": request.n,
            "first_sample": request.first_sample,
            "seed": request.seed,
            "labels": None if request.labels is None else list(request.labels),
            "guidance": kept_guidance(request.guidance),
            "denoise": request.strength,
            "certify": request.certify,
            "redraw_nonfinite": request.redraw_nonfinite,
            "decode": request.decode,
            "tolerance": request.tolerance,
            **added(request),
            "format": self.format,
            "shard_size": self.shard_size,
            **({} if self.engine is None else {"engine": self.engine}),
        }

    @cached_property
    def text(self) -> bytes:
        """The job as its file ``job.json`` holds it: equal jobs, equal bytes."""
        return document({"format": FORMAT, "schema": SCHEMA, "job": self.content}).encode()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of :attr:`text`: what a finished shard names as its job."""
        return hashlib.sha256(self.text).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """How ``other``, the value of "job" in another job's file, departs from this job, in words."""
        mine = self.content
        return [
            f"{name} is {_short(other.get(name))} there, {_short(mine.get(name))} here"
            for name in [*mine, *sorted(set(other) - set(mine))]
            if other.get(name) != mine.get(name)
        ]

    def bytes_needed(self, shape: ModelShape) -> int:
        """Roughly what the files will take; pictures are compressed, so half of their pixels."""
        numbers = self.request.n * shape.channels * shape.image_size**2
        return numbers // 2 if self.format in PICTURES else 4 * numbers


def document(content: dict[str, Any]) -> str:
    """JSON with one line a key, and one line an item of lists of objects."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        else:
            text = json.dumps(value, allow_nan=False)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else f"{text[:64]}... ({len(text)} characters)"
