"""The parity card: how far a bundle is from PyTorch. FORMAT.md, "Parity card", is the normative text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.document import Reader
from ..runtime.precision import Tolerance

PARTS = ("guided", "resident", "cuda", "cuda_guided", "sample", "denoised", "golden")


@dataclass(frozen=True, slots=True)
class Difference:
    """How far ``found`` is from ``expected``: cosine, ratio of norms, and quantiles of the absolute difference."""

    cosine: float
    norm_ratio: float
    rms: float
    p99: float
    max: float

    @classmethod
    def between(cls, found: NDArray[Any], expected: NDArray[Any]) -> Difference:
        a: NDArray[np.float64] = found.astype(np.float64).ravel()
        b: NDArray[np.float64] = expected.astype(np.float64).ravel()
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return cls(*([float("inf")] * 5))  # a sample that overflows on one side agrees with nothing
        delta = np.abs(a - b)
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        return cls(
            cosine=float(a @ b) / max(norms[0] * norms[1], 1e-300),
            norm_ratio=norms[0] / max(norms[1], 1e-300),
            rms=float(np.sqrt(np.mean(delta**2))),
            p99=float(np.quantile(delta, 0.99)),
            max=float(delta.max()),
        )


@dataclass(frozen=True, slots=True)
class Native:
    """The native engine in one precision: how far its samples, or where none were drawn its worst block's patches, are
    off, their largest round-trip error, and the most that these may be.
    """

    difference: Difference
    certificate: float | None
    tolerance: Tolerance

    @property
    def finite(self) -> bool:
        return math.isfinite(self.difference.rms + (self.certificate or 0.0))

    def to_json(self) -> dict[str, Any]:
        certificate = {} if self.certificate is None else {"certificate": self.certificate}
        return {**asdict(self.difference), **certificate, "tolerance": asdict(self.tolerance)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What was compared, on what, and how far it was off. :meth:`from_json` and :meth:`to_json` are inverses.

    ``oracle`` and ``backend`` are descriptions, ``method`` how blocks were inverted, ``samples`` how many pairs were
    compared. ``blocks`` are the differences of each block's inverse alone, by block, ``guided`` and ``resident`` those
    of the worst block under guidance and of the graphs for devices, ``cuda`` and ``cuda_guided`` of those for ONNX
    Runtime's CUDA provider, in float32; ``native`` is the native engine by precision; ``sample``, ``denoised`` and
    ``golden`` are of whole images. ``certificate`` is the largest round-trip error. None is what was not compared.
    """

    oracle: str
    backend: str
    method: str
    samples: int
    tolerance: Tolerance
    blocks: Mapping[int, Difference] = field(default_factory=dict)
    guided: Difference | None = None
    bits_per_dim_shift: float | None = None
    resident: Difference | None = None
    cuda: Difference | None = None
    cuda_guided: Difference | None = None
    native: Mapping[str, Native] = field(default_factory=dict)
    sample: Difference | None = None
    certificate: float
    denoised: Difference | None = None
    golden: Difference | None = None

    def rows(self) -> list[tuple[str, Difference]]:
        """Every difference with its name, in the order of reading."""
        blocks = [(f"block {block}", difference) for block, difference in self.blocks.items()]
        parts = [(part, found) for part in PARTS if (found := getattr(self, part)) is not None]
        return blocks + parts + [(f"native {name}", row.difference) for name, row in self.native.items()]

    def failures(self) -> list[str]:
        """Sentences about what is out of tolerance; empty if all is well."""
        limit = self.tolerance
        told = [(name, found) for name, found in self.rows() if not name.startswith("native")]
        measured = [(f"{name} rms error", found.rms, limit.rms) for name, found in told]
        measured.append(("round-trip error", self.certificate, limit.certificate))
        if (row := self.native.get("fp32")) is not None:  # the others are as good as they are: nobody has to take them
            measured.append(("native fp32 rms error", row.difference.rms, row.tolerance.rms))
            measured.append(("native fp32 round-trip error", row.certificate or 0.0, row.tolerance.certificate))
        if self.bits_per_dim_shift is not None:
            measured.append(("shift of bits/dim", self.bits_per_dim_shift, limit.bits_per_dim))
        return [f"{what} {value:.2g} is above {most:.2g}" for what, value, most in measured if not value <= most]

    def to_json(self) -> dict[str, Any]:
        """The JSON document of FORMAT.md; what was not compared is not in it."""
        blocks = [{"block": block, **asdict(difference)} for block, difference in self.blocks.items()]
        native = {name: row.to_json() for name, row in self.native.items() if row.finite}
        document = asdict(self) | {"blocks": blocks or None, "native": native or None}
        return {name: value for name, value in document.items() if value is not None}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> Card:
        """The card in a manifest, ``source``. Raises BundleError for one of another version."""
        reader = Reader(source, "parity card", "verify the bundle to have a new one")
        tolerance = _tolerance(reader, document)
        natives = reader.get(document, "native", dict) if "native" in document else {}
        entries = reader.get(document, "blocks", list) if "blocks" in document else []
        blocks = [reader.typed(entry, dict, "a block") for entry in entries]
        parts: dict[str, Any] = {
            name: _difference(reader, reader.get(document, name, dict)) for name in PARTS if name in document
        }
        if "bits_per_dim_shift" in document:
            parts["bits_per_dim_shift"] = reader.number(document, "bits_per_dim_shift")
        return cls(
            oracle=reader.get(document, "oracle", str),
            backend=reader.get(document, "backend", str),
            method=reader.get(document, "method", str),
            samples=reader.natural(document, "samples", 1),
            tolerance=tolerance,
            blocks={reader.natural(block, "block", 0): _difference(reader, block) for block in blocks},
            native={name: _native(reader, reader.get(natives, name, dict)) for name in natives},
            certificate=reader.number(document, "certificate"),
            **parts,
        )


def _tolerance(reader: Reader, document: Mapping[str, Any]) -> Tolerance:
    tolerance = reader.get(document, "tolerance", dict)
    return Tolerance(*(reader.number(tolerance, name) for name in Tolerance.__slots__))


def _native(reader: Reader, entry: Mapping[str, Any]) -> Native:
    certificate = reader.number(entry, "certificate") if "certificate" in entry else None
    return Native(_difference(reader, entry), certificate, _tolerance(reader, entry))


def _difference(reader: Reader, entry: Mapping[str, Any]) -> Difference:
    return Difference(*(reader.number(entry, name) for name in Difference.__slots__))
