"""The plan of a bundle on one machine: which blocks are solved in parallel, as it was measured there.

Plans lie in the bundle's folder ``plans``, one JSON file a machine. They are no part of the bundle's identity, and
decide speed alone: what a sample may differ by is the mode's tolerance. See FORMAT.md, "Plans".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .decode import TOLERANCES, Parallel
from .document import Reader, write_document
from .errors import Remedy

FOLDER = "plans"
FORMAT = "tarflow-plan"
SCHEMA = 1
_LARGEST = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured and chosen for batches of up to ``rows`` rows (images times guidance branches).

    By block: the window (1: serial), the dependent passes it took, seconds for it and for serial decoding, and the
    largest difference between the two. ``branches`` is 2 if the samples were guided. With ``lanes``
    above 1 the batch is divided among so many threads, which solve all blocks serially.
    """

    rows: int
    windows: tuple[int, ...]
    passes: tuple[int, ...]
    seconds: tuple[float, ...]
    serial_seconds: tuple[float, ...]
    errors: tuple[float, ...]
    branches: int = 1
    lanes: int = 1

    @property
    def speedup(self) -> float:
        """Over serial decoding, all blocks together."""
        return sum(self.serial_seconds) / sum(self.seconds)


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows by decoding mode, in growing order, for one bundle on one machine."""

    bundle: str  # SHA-256 of the manifest
    machine: str
    samples: int  # that were measured
    modes: Mapping[str, tuple[Row, ...]]

    def ways(self, mode: str, images: int, branches: int, tolerance: float) -> tuple[Parallel | None, ...] | None:
        """How to solve each block of a batch of so many images; None where nothing was measured: serially."""
        best = self._best(mode, images, branches)
        if best is None:
            return None
        # Twice the passes of the measured samples are an exception, which serial decoding ends.
        return tuple(
            Parallel(window, tolerance, 2 * passes) if window > 1 else None
            for window, passes in zip(best.windows, best.passes, strict=True)
        )

    def lanes(self, mode: str, images: int, branches: int) -> int:
        """Among how many threads to divide a batch; a larger one than was measured, like the largest."""
        mode = mode if mode in self.modes else "exact"  # what serial decoding is divided like
        largest = max(self.modes.get(mode, ()), key=lambda row: row.rows, default=None)
        best = self._best(mode, images, branches) or largest
        return best.lanes if best is not None else 1

    def _best(self, mode: str, images: int, branches: int) -> Row | None:
        """The row that is closest from above."""
        known = [row for row in self.modes.get(mode, ()) if row.branches in (1, branches)]
        fitting = [row for row in known if row.rows >= images * branches]
        return min(fitting, key=lambda row: (row.rows, -row.branches), default=None)

    def write(self, bundle: Bundle) -> Path:
        """Keep the plan in the bundle's folder; one of the same machine is replaced."""
        path = plan_path(bundle, self.machine)
        path.parent.mkdir(exist_ok=True)
        write_document(path, {"format": FORMAT, "schema": SCHEMA, **asdict(self)})
        return path


def plan_path(bundle: Bundle, machine: str) -> Path:
    """Where the plan of a machine is kept."""
    return bundle.folder / FOLDER / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json")


def find_plan(bundle: Bundle, machine: str) -> Plan | None:
    """The plan of this bundle for this machine, or None. Raises BundleError for one that cannot be read."""
    path = plan_path(bundle, machine)
    if not machine or path.is_symlink() or not path.is_file():
        return None
    again = Remedy("calibrate", {"bundle": bundle.folder})
    reader = Reader(str(path), "plan", f"remove '{path}', or measure again what is fastest here", again)
    plan = _read(reader, reader.versioned(path, _LARGEST, FORMAT, SCHEMA), bundle.manifest.config.blocks)
    return plan if (plan.bundle, plan.machine) == (bundle.hash, machine) else None


def _read(reader: Reader, document: dict[str, Any], blocks: int) -> Plan:
    modes = reader.get(document, "modes", dict)
    return Plan(
        reader.get(document, "bundle", str),
        reader.get(document, "machine", str),
        reader.natural(document, "samples", 1),
        {mode: tuple(_rows(reader, modes, mode, blocks)) for mode in TOLERANCES},
    )


def _rows(reader: Reader, modes: dict[str, Any], mode: str, blocks: int) -> Iterator[Row]:
    for number, entry in enumerate(reader.get(modes, mode, list)):
        row = reader.typed(entry, dict, f"modes.{mode}[{number}]")
        windows, passes = (reader.integers(row, name, 1) for name in ("windows", "passes"))
        seconds, serial = (reader.numbers(row, name, 1e-12) for name in ("seconds", "serial_seconds"))
        errors = reader.numbers(row, "errors")
        if {len(column) for column in (windows, passes, seconds, serial, errors)} != {blocks}:
            raise reader.wrong(f"modes.{mode}[{number}] does not describe {blocks} blocks")
        counts = {"branches": 1, "lanes": 1} | row  # of before there were any
        branches, lanes = reader.natural(counts, "branches", 1, most=2), reader.natural(counts, "lanes", 1)
        yield Row(reader.natural(row, "rows", 1), windows, passes, seconds, serial, errors, branches, lanes)
