"""``tarflow generate --out``: many samples in shards, by this process, by several, or by Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.files import check_room, check_writable, size_text
from ..runtime.opening import Opening
from .console import emit, say, tell_of_classes
from .progress import duration_text, sample_bar
from .verdict import Verdict, round_trip_text

if TYPE_CHECKING:
    from ..runtime.samples import Progress
    from ..shards.job import Job, Shard
    from ..shards.record import Record
    from ..shards.workers import Crew

WITH_OUT = "with --out; shards are drawn by seed, in tiles of 16, and are all that is written: drop it"
WITHOUT_OUT = "without --out; it is about shards: name a folder for them with --out"


@dataclass(frozen=True, slots=True)
class Means:
    """Who draws, how each opens the bundle, and whether nothing is said meanwhile: nothing that a sample depends on.
    ``ray`` "" is Ray at no address.
    """

    workers: int | None
    ray: str | None
    opening: Opening
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Telling:
    """How it is told what was drawn, and whether suspect round trips are a failure."""

    json: bool
    strict: bool


def refuse(why: str, **options: object) -> None:
    """Raise InputError, which says ``why``, for options that were given but mean nothing here."""
    given = [f"`{name}`" for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{', '.join(given)} means nothing {why}")


def engine_for(bundle: Bundle, out: Path, ray: str | None, opening: Opening) -> str | None:
    """The engine that a job records; see :func:`~tarflow.shards.engine.engine_of`."""
    from ..shards.engine import engine_of
    from ..shards.folder import recorded

    gpus = False
    if ray is not None and opening.else_on("auto").provider == "auto" and recorded(out) is None:
        from ..shards.cluster import has_gpus

        gpus = has_gpus(ray)
    return engine_of(bundle, out, opening, gpus)


def draw_shards(bundle: Bundle, job: Job, out: Path, means: Means, telling: Telling) -> None:
    """Draw what is missing of a job in folder ``out``, write the index, and say what is there. Exits with 1 if samples
    are not finite, or have no round trip; strictly, also if a round trip is suspect.
    """
    from ..shards.folder import INDEX, claimed, forget_index, write_index
    from ..shards.record import finished

    n = job.request.n
    if means.workers is not None and means.workers < 1:
        raise InputError.of("workers", means.workers, "1 or more")
    tell_of_classes(bundle, job.request.labels)
    started, shards = time.monotonic(), job.shards()
    with claimed(out, job), told_to_continue(out):
        records = {record.name: record for shard in shards if (record := finished(out, job, shard))}
        missing = [shard for shard in shards if job.name(shard) not in records]
        kept = sum(record.samples for record in records.values())
        if kept:
            say(f"{len(records)} of {len(shards)} shards are there, {kept} of {n} samples")
        if missing:
            check_writable(out / INDEX)
            needed = job.bytes_needed(bundle.manifest.config) * (n - kept) // n
            check_room(out, needed, "choose another folder, or `format` tar, which compresses")
            forget_index(out)
            records |= {record.name: record for record in _drawn(bundle, job, out, means, missing)}
        index = write_index(out, job, [records[job.name(shard)] for shard in shards])
    _tell(bundle, out, index, n - kept, time.monotonic() - started, telling)


@contextlib.contextmanager
def told_to_continue(out: Path) -> Iterator[None]:
    """On Ctrl-C, SIGTERM or SIGHUP, say what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = len(list((out / "records").glob("shard-*.json")))
        say(
            f"stopped: {kept} finished shards are kept in '{out}'; the same command continues with what is missing"
            if kept
            else "stopped before a shard was finished: nothing is kept; a smaller --shard-size loses less"
        )
        raise


def _drawn(bundle: Bundle, job: Job, out: Path, means: Means, missing: list[Shard]) -> list[Record]:
    """Draw the missing shards, with progress on stderr, by a crew of no more than there are shards."""
    from ..shards.workers import Local, Solo, Task, carry_out

    task = Task(job, bundle.folder.absolute(), out.absolute(), means.opening)
    kept = job.request.n - sum(shard.samples for shard in missing)
    records: list[Record] = []
    with sample_bar(job.request.n, kept, means.quiet) as show:

        def drawn() -> int:
            return kept + sum(record.samples for record in records)

        def within(progress: Progress) -> None:
            show(drawn() + progress.done / progress.total * missing[len(records)].samples)

        def finished(record: Record) -> None:
            records.append(record)
            show(drawn())

        with contextlib.ExitStack() as stack:
            crew: Crew
            if means.ray is not None:
                from ..shards.cluster import RayCrew, connected, share

                stack.enter_context(connected(means.ray))
                crew = RayCrew(task, share(means.workers, means.opening, len(missing)), say)
            elif (workers := min(means.workers or 1, len(missing))) > 1:
                crew = Local(task, workers)
            else:
                crew = Solo(task, within)
            stack.callback(crew.close)
            carry_out(crew, missing, finished)
    return records


def _tell(bundle: Bundle, out: Path, index: dict[str, Any], drawn: int, seconds: float, telling: Telling) -> None:
    from ..shards.folder import INDEX

    size, kept = sum(shard["size"] for shard in index["shards"]), index["samples"] - drawn
    if telling.json:
        emit(bundle=bundle.folder, out=out, drawn=drawn, kept=kept, bytes=size, seconds=seconds, **index)
    else:
        samples = f"{index['samples']} samples of {bundle.manifest.name}"
        print(f"{samples} in {len(index['shards'])} shards, {size_text(size)}: {out}")
        print(f"{drawn} drawn now in {duration_text(seconds)}, {kept} found finished")
        if index["job"]["certify"]:
            print(round_trip_text(index["certificate"]))
        print(index["level"])
    cure = (
        f"'{out / INDEX}' lists them. Lower the guidance, or draw them again with --redraw-nonfinite and another --out"
    )
    counts = index["samples"], index["nonfinite"], index["uncertified"], index["suspects"]
    Verdict(*counts, index["suspect_above"], cure).tell(telling.strict)
