"""The plan of a bundle on one machine: which blocks are solved in parallel, measured by ``tarflow calibrate``.

Plans lie in the bundle's folder ``plans``, one JSON file a machine. They are no part of the bundle's identity, and
decide speed alone: what a sample may differ by is the mode's tolerance. See FORMAT.md, "Plans".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .decode import TOLERANCES, Parallel
from .errors import BundleError
from .files import replacing

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
        document = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
        with replacing(path) as file:
            file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        return path


def plan_path(bundle: Bundle, machine: str) -> Path:
    """Where the plan of a machine is kept."""
    return bundle.folder / FOLDER / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json")


def find_plan(bundle: Bundle, machine: str) -> Plan | None:
    """The plan of this bundle for this machine, or None. Raises BundleError for one that cannot be read."""
    path = plan_path(bundle, machine)
    if not machine or path.is_symlink() or not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than 1 MiB")
        plan = _read(json.loads(path.read_text()), bundle.manifest.config.blocks)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"'{path}' is no plan this version reads ({str(error)[:120]}); make it again: tarflow calibrate "
            f"'{bundle.folder}', or remove it"
        ) from None
    return plan if (plan.bundle, plan.machine) == (bundle.hash, machine) else None


def _read(document: dict[str, Any], blocks: int) -> Plan:
    if (document["format"], document["schema"]) != (FORMAT, SCHEMA):
        raise ValueError(f"its format is {document['format']!r}, schema {document['schema']!r}")
    modes = {mode: tuple(_read_row(row, blocks) for row in document["modes"][mode]) for mode in TOLERANCES}
    return Plan(str(document["bundle"]), str(document["machine"]), int(document["samples"]), modes)


def _read_row(row: dict[str, Any], blocks: int) -> Row:
    windows, passes = (tuple(int(x) for x in row[name]) for name in ("windows", "passes"))
    seconds, serial, errors = (tuple(float(x) for x in row[name]) for name in ("seconds", "serial_seconds", "errors"))
    lists = (windows, passes, seconds, serial, errors)
    count, branches, lanes = int(row["rows"]), int(row.get("branches", 1)), int(row.get("lanes", 1))
    counts = (count, lanes, *windows, *passes)
    if branches not in (1, 2) or {len(x) for x in lists} != {blocks} or min(counts) < 1:
        raise ValueError(f"a row does not describe {blocks} blocks")
    if not all(0 < x < math.inf for x in (*seconds, *serial)):
        raise ValueError("a time is not a positive number")
    return Row(count, windows, passes, seconds, serial, errors, branches, lanes)
