"""Damaged files, read: a sentence, or what is right; no traceback, no crash, no hang, and not a machine's memory."""

from __future__ import annotations

import functools
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.torture import children
from bench.torture.children import Case, Outcome, play
from bench.torture.commands import ROOT
from bench.torture.mutations import cut, flipped
from bench.torture.report import Section
from bench.torture.targets import TARGETS, Target
from tarflow.cli.messages import spell
from tarflow.runtime.errors import TarflowError

KINDS = ("flip", "cut", "flip", "cut", "absurd")  # by turns
FINE = ("refused", "right", "other values")
ABOUT = (
    "Files as tarflow writes them, damaged {count} times each: one to eight bits flipped, the end cut off, every fifth "
    "time a value that no honest file holds; half of them with all hashes and checksums made right again, so that what "
    "parses them sees them. Each is read as commands read it, in a child process. Fine are a sentence, what is right, "
    "and where no checksum speaks against it what the file now says. Faults are anything else: a traceback, a crash, "
    "another result than the checksum's, more than {seconds:g} s, or {memory} MiB more than before."
)


@dataclass
class Tally:
    """What came of one kind of file. Faults by what they are: how many, and the number of the first."""

    target: str
    verdicts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)


class Files:
    """A target's files in a folder of one's own, to be damaged by a case's number and made whole again."""

    def __init__(self, target: Target, template: Path, names: list[str]) -> None:
        self.target, self.names = target, names
        self.folder = Path(tempfile.mkdtemp(dir=template.parent)) / "files"
        shutil.copytree(template, self.folder)
        self.whole = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def damage(self, number: int) -> tuple[str, bool]:
        """Damage a file: its name, and whether hashes speak for what it now holds."""
        target, dice = self.target, dice_of(self.target, number)
        name = self.names[dice.integers(len(self.names))]
        content = self.whole[self.folder / name]
        kind, mend = KINDS[number % len(KINDS)], number // len(KINDS) % 2 == 1
        absurd = kind == "absurd" and target.absurd is not None
        inside = mend and target.inside is not None and not absurd
        if absurd and target.absurd is not None:
            damaged = target.absurd(content, dice)
        elif inside and target.inside is not None:
            damaged = target.inside(content, dice)
        else:
            damaged = (cut if kind == "cut" else flipped)(content, dice, target.head(content))
        (self.folder / name).write_bytes(damaged)
        if mend and target.mend is not None:
            target.mend(self.folder, name)
        return name, inside or (mend and target.mend is not None) or (absurd and target.mend is None)

    def restore(self) -> None:
        """All files as they were, and no others."""
        for path in self.folder.rglob("*"):
            if not path.is_dir() and path not in self.whole:
                path.unlink()
        for path, content in self.whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def reading(name: str, template: Path, names: list[str]) -> Case:
    """What does a case: damages, reads, makes whole again, and says what came of it."""
    target = next(target for target in TARGETS if target.name == name)
    files = Files(target, template, names)
    expected = target.read(files.folder)

    def case(number: int) -> str:
        _, spoken_for = files.damage(number)
        try:
            found = target.read(files.folder)
        except TarflowError as error:
            spell(error)
            return "refused"
        except MemoryError:
            return "memory: more than there is"
        except BaseException as error:
            return f"traceback: {_place(error)}"
        finally:
            files.restore()
        if _same(found, expected):
            return "right"
        if target.guarded and not spoken_for:
            return "wrong: other values than those of its checksum"
        return "other values"

    return case


def dice_of(target: Target, number: int) -> np.random.Generator:
    """Where a case's damage comes from: its number, so that it can be made again."""
    return np.random.default_rng([zlib.crc32(target.name.encode()), number])


def torture(count: int, only: str = "", keep: Path | None = None) -> Section:
    """Damage the targets whose names begin with ``only``."""
    tallies = [_tally(target, count, keep) for target in TARGETS if target.name.startswith(only)]
    rows = [
        (tally.target, tally.verdicts.total(), *(tally.verdicts[word] for word in FINE), len(tally.faults))
        for tally in tallies
    ]
    columns = ("file", "damaged", *FINE, "faults")
    faults = [
        f"{tally.target}, {len(numbers)} times, first in case {numbers[0]}: {what}"
        for tally in tallies
        for what, numbers in sorted(tally.faults.items(), key=lambda item: -len(item[1]))
    ]
    about = ABOUT.format(count=count, seconds=children.SECONDS, memory=children.MEMORY >> 20)
    return Section("Damage", about, columns, rows, faults)


def _tally(target: Target, count: int, keep: Path | None) -> Tally:
    tally = Tally(target.name)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template"
        template.mkdir()
        names = target.make(template)
        for outcome in play(functools.partial(reading, target.name, template, names), count):
            verdict = _verdict(outcome)
            tally.verdicts[verdict.partition(":")[0]] += 1
            if verdict not in FINE:
                tally.faults.setdefault(verdict, []).append(outcome.number)
        if keep is not None:
            _keep(Files(target, template, names), keep, tally)
    print(f"{target.name}: {dict(tally.verdicts)}", file=sys.stderr, flush=True)
    return tally


def _verdict(outcome: Outcome) -> str:
    if outcome.memory > children.MEMORY:
        return f"memory: {outcome.verdict}, but more than {children.MEMORY >> 20} MiB were taken"
    return outcome.verdict


def _keep(files: Files, keep: Path, tally: Tally) -> None:
    """The file of the first case of each fault."""
    for numbers in tally.faults.values():
        name, _ = files.damage(numbers[0])
        place = keep / f"{tally.target.replace(' ', '-')}-{numbers[0]}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.folder / name, place)
        files.restore()


def _place(error: BaseException) -> str:
    """An error as a line: its type, its words, and the line of ours that raised it last."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    where = f"{Path(ours[-1].filename).resolve().relative_to(ROOT)}, {ours[-1].name}" if ours else "nowhere"
    said = re.sub(r"'.*'|\d+(\.\d+)?", "*", str(error).partition("\n")[0])[:100]
    return f"{type(error).__name__} in {where}: {said}"


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, np.ndarray):
        return bool(np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"))
    return bool(found == expected)
