"""A job: many samples of one bundle, cut into shards. What is drawn, and nothing of who draws it or how fast.

Shards follow the sample index: the k-th ends at a multiple of the shard size, itself a multiple of the tile that
reproducible sampling computes in. So a shard is a function of the job and its number. docs/SCALE.md has the format.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle import ModelShape
from ..runtime.errors import InputError
from ..runtime.flow import REPRODUCIBLE_TILE
from ..runtime.guidance import Guidance

FORMAT = "tarflow-job"
SCHEMA = 1
DEFAULT_SHARD = 1024
SUFFIXES = {"npy": ".npy", "safetensors": ".safetensors", "png": "", "tar": ".tar"}  # a png shard is a folder
UNGUIDED = Guidance()
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
    """Samples ``first_sample ... first_sample + n - 1`` of a bundle, by its hash, with all that fixes their bits.

    ``labels`` are dealt out in turn, beginning at the first sample; None is the null class. ``denoise`` is the factor
    on the noise variance, None for none. Raises InputError for numbers that make no job.
    """

    bundle: str
    n: int
    first_sample: int = 0
    seed: int = 0
    labels: tuple[int, ...] | None = None
    guidance: Guidance = UNGUIDED
    denoise: float | None = None
    certify: bool = True
    redraw_nonfinite: bool = False
    decode: str | None = None
    tolerance: float | None = None
    format: str = "npy"
    shard_size: int = DEFAULT_SHARD

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"--n is {self.n}; expected 1 or more samples")
        if not 0 <= self.first_sample < _MOST_SAMPLES or self.n > _MOST_SAMPLES:
            raise InputError(f"samples {self.first_sample} ... + {self.n} are out of range; expected 0 to 2^63")
        if self.format not in SUFFIXES:
            raise InputError(f"format '{self.format}' is unknown; expected one of {', '.join(SUFFIXES)}")
        if self.shard_size < 1 or self.shard_size % REPRODUCIBLE_TILE:
            raise InputError(
                f"--shard-size is {self.shard_size}; expected a multiple of {REPRODUCIBLE_TILE}, the rows that are "
                f"computed together, such as {max(1, round(self.shard_size / REPRODUCIBLE_TILE)) * REPRODUCIBLE_TILE}"
            )
        for name, value in (("--tolerance", self.tolerance), ("--denoise-strength", self.denoise)):
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; expected a number of 0 or more")
        if self._count > _MOST_SHARDS:
            least = -(-self.n // (_MOST_SHARDS - 1))
            raise InputError(
                f"{self.n} samples make {self._count} shards of {self.shard_size}; expected {_MOST_SHARDS} at most: "
                f"pass --shard-size {-(-least // REPRODUCIBLE_TILE) * REPRODUCIBLE_TILE}"
            )

    @property
    def _count(self) -> int:
        return (self.first_sample + self.n - 1) // self.shard_size - self.first_sample // self.shard_size + 1

    def shards(self) -> list[Shard]:
        """All shards, in order: the first and the last may be shorter than the others."""
        end, shards = self.first_sample + self.n, []
        for number in range(self._count):
            edge = (self.first_sample // self.shard_size + number) * self.shard_size
            first = max(edge, self.first_sample)
            shards.append(Shard(number, first, min(edge + self.shard_size, end) - first))
        return shards

    def name(self, shard: Shard) -> str:
        """The name of a shard's file, or of its folder."""
        return f"shard-{shard.number:06}{SUFFIXES[self.format]}"

    def labels_of(self, shard: Shard) -> NDArray[np.int64]:
        """(samples,): below 0 for the null class."""
        if self.labels is None:
            return np.full(shard.samples, -1, np.int64)
        turn = (shard.first - self.first_sample + np.arange(shard.samples)) % len(self.labels)
        return self._turns[turn]

    @cached_property
    def _turns(self) -> NDArray[np.int64]:
        return np.array(self.labels, np.int64)

    @cached_property
    def text(self) -> bytes:
        """The job as its file ``job.json`` holds it: equal jobs, equal bytes."""
        return document({"format": FORMAT, "schema": SCHEMA, "job": asdict(self)}).encode()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of :attr:`text`: what a finished shard names as its job."""
        return hashlib.sha256(self.text).hexdigest()

    def differences(self, other: object) -> list[str]:
        """How ``other``, the value of "job" in another job's file, departs from this job, in words."""
        if not isinstance(other, dict):
            return ["it is not readable"]
        mine = json.loads(json.dumps(asdict(self)))
        return [
            f"{name} is {_short(other.get(name))} there, {_short(mine.get(name))} here"
            for name in [*mine, *sorted(set(other) - set(mine))]
            if other.get(name) != mine.get(name)
        ]

    def check(self, shape: ModelShape) -> None:
        """Raise InputError if images of this shape cannot be written in the job's format, or guidance does nothing."""
        self.guidance.check(shape, np.array(self.labels or (-1,), np.int64)[: self.n])
        if self.format in ("png", "tar") and shape.channels not in (1, 3):
            raise InputError(
                f"pictures have 1 or 3 channels; this model has {shape.channels}: pass --format npy or safetensors"
            )

    def bytes_needed(self, shape: ModelShape) -> int:
        """Roughly what the files will take; pictures are compressed, so half of their pixels."""
        numbers = self.n * shape.channels * shape.image_size**2
        return numbers // 2 if self.format in ("png", "tar") else 4 * numbers


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
