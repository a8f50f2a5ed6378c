"""SIGKILL at calls that change files, one run a call: the old or the new stands, and a second run mends the rest."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.torture.commands import line, run
from bench.torture.report import Section
from bench.torture.scenes import SCENES, Broken, Scene, Stage, hidden

CALLS = (
    "write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,ftruncate,truncate,fallocate,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync,syncfs,sync_file_range,msync,chmod,fchmod,fchmodat"
)
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")


@dataclass(frozen=True)
class Call:
    """The ``number``-th call of a name that a process makes, counted from 1."""

    name: str
    number: int


@dataclass
class Tally:
    """What came of a scene's kills. ``faults`` are sentences, each with the call that was killed at."""

    scene: str
    calls: int = 0  # that change files below the scene's folder
    kills: int = 0
    missed: int = 0  # runs that ended before they came to the call
    stood: Counter[str] = field(default_factory=Counter)
    left: int = 0  # kills after which something hidden was left for the second run to remove
    faults: list[str] = field(default_factory=list)


def calls_of(scene: Scene, place: Path) -> list[Call]:
    """Each call of the command that changes something below ``place``, in order, as one run makes them."""
    log = place.parent / "calls.txt"
    run(["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-e", f"trace={CALLS}", "-o", str(log), *_line(scene, place)])
    counted: Counter[tuple[str, str]] = Counter()
    found: dict[Call, None] = {}
    for text in log.read_text(errors="replace").splitlines():
        match = _CALL.match(text)
        if match is None:
            continue
        process, name, arguments = match.groups()
        counted[process, name] += 1
        if str(place) in arguments:
            found[Call(name, counted[process, name])] = None
    return list(found)


def spread(calls: Sequence[Call], most: int) -> list[Call]:
    """All, or so many of them spread evenly, the first and the last among them."""
    if len(calls) <= most:
        return list(calls)
    return [calls[round(k * (len(calls) - 1) / (most - 1))] for k in range(most)]


def kill(scene: Scene, place: Path, call: Call) -> bool:
    """Run the command up to the call, which is never made; whether it came to that."""
    inject = f"inject={call.name}:signal=KILL:when={call.number}"
    tracer = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call.name}",
        "-e",
        inject,
    ]  # seccomp injects none
    return run([*tracer, *_line(scene, place)], TMPDIR=str(_scratch(place))).returncode != 0


def play(scene: Scene, most: int) -> Tally:
    """All kills of a scene."""
    tally = Tally(scene.name)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        stage = _stage(scene, Path(folder), place)
        calls = calls_of(scene, _fresh(stage, place))
        tally.calls = len(calls)
        for call in spread(calls, most):
            _fresh(stage, place)
            tally.kills += 1
            if not kill(scene, place, call):
                tally.missed += 1
            try:
                tally.stood[scene.stands(place, stage)] += 1
            except Broken as broken:
                tally.stood["neither"] += 1
                tally.faults.append(f"killed at {call.name} {call.number}: {broken}")
            tally.left += any(True for _ in hidden(place))
            tally.faults += [f"killed at {call.name} {call.number}: {fault}" for fault in _second(scene, place, stage)]
    return tally


def _second(scene: Scene, place: Path, stage: Stage) -> Iterator[str]:
    """What is wrong after the command was given again."""
    done = run(line(*scene.again(place)), TMPDIR=str(_scratch(place)))
    if done.returncode:
        yield f"the second run ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        return
    remains = [path.relative_to(place).as_posix() for path in hidden(place)]
    if remains:
        yield f"after the second run, '{re.sub(r'[a-z0-9_]{8}(?=/|$)', '*', remains[0])}' is left"
        return
    try:
        scene.finished(place, stage)
    except Broken as broken:
        yield str(broken)


def _stage(scene: Scene, folder: Path, place: Path) -> Stage:
    """The scene's files before and after, the latter by the command itself, in the place where it is killed later."""
    stage = Stage(folder / "before", folder / "after")
    scene.prepare(stage.before)
    done = run(_line(scene, _fresh(stage, place)))
    if done.returncode:
        raise SystemExit(f"'{scene.name}' ended with {done.returncode} though nobody killed it:\n{done.stderr}")
    place.rename(stage.after)
    return stage


def _fresh(stage: Stage, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(_scratch(place), ignore_errors=True)
    _scratch(place).mkdir()
    return Path(shutil.copytree(stage.before, place))


def _scratch(place: Path) -> Path:
    """Where the command's temporary files go, which the system empties."""
    return place.with_name("scratch")


def _line(scene: Scene, place: Path) -> list[str]:
    return line(*scene.command(place))


ABOUT = (
    "SIGKILL instead of a call that writes, renames, links, removes or syncs below the command's folder: all such "
    "calls, or {most} of them spread evenly. A fault is a file or folder that is neither the old nor the new one, a "
    "second run that fails or ends otherwise than the first would have, and anything hidden that is left after it."
)


def torture(most: int, only: str = "") -> Section:
    """Play the scenes whose names begin with ``only``."""
    tallies = [_told(play(scene, most)) for scene in SCENES if scene.name.startswith(only)]
    rows = [
        (
            f"`{tally.scene}`",
            tally.calls,
            tally.kills,
            tally.stood["old"],
            tally.stood["new"],
            tally.left,
            len(tally.faults),
        )
        for tally in tallies
    ]
    columns = ("command", "calls", "kills", "old stood", "new stood", "left hidden files", "faults")
    faults = [f"`{tally.scene}` {fault}" for tally in tallies for fault in tally.faults]
    return Section("Kills", ABOUT.format(most=most), columns, rows, faults)


def _told(tally: Tally) -> Tally:
    print(f"{tally.scene}: {tally.kills} kills, {len(tally.faults)} faults", file=sys.stderr, flush=True)
    return tally
