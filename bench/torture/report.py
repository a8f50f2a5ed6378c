"""A section of bench/RESULTS-TORTURE.md: what was tried, in a table, and every fault in a sentence."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results import replace_section
from tarflow.runtime.machine import cores, processor

RESULTS = Path(__file__).parent.parent / "RESULTS-TORTURE.md"
_SHOWN = 30  # faults of a section; more of them say nothing new
_HEAD = """# Results under torture

`make torture` writes this: what kills, damaged files and hostile clients did. A fault is what should not have been."""


@dataclass(frozen=True)
class Section:
    """What one kind of torture found. ``about`` says what was done and what counts as a fault."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    faults: Sequence[str]

    def text(self) -> str:
        lines = [f"## {self.title}", "", self.about, "", _machine(), ""]
        lines += [_row(self.columns), _row(["---"] * len(self.columns)), *map(_row, self.rows), ""]
        if not self.faults:
            return "\n".join([*lines, "No fault."])
        few = [f"- {' '.join(fault.split())[:400]}" for fault in self.faults[:_SHOWN]]
        more = [f"- and {len(self.faults) - _SHOWN} more"] if len(self.faults) > _SHOWN else []
        return "\n".join([*lines, f"Faults, {len(self.faults)}:", "", *few, *more])

    def write(self) -> None:
        """Replace the section where it stands."""
        if not RESULTS.exists():
            RESULTS.write_text(_HEAD + "\n")
        replace_section(RESULTS, self.text())


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _machine() -> str:
    asked = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
    return f"{commit}, {cores()} cores ({processor()}), Python {platform.python_version()}."
