"""The bench of a device: all draw the same samples by turns, are timed, and compared with the truth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np

from tarflow.checkpoint import load
from tarflow.runtime.backend import Array
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import TarflowError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.noise import normal

from .field import Choice, Entrant, Rivals, Task, floor_bytes, ours

GUIDANCE = (0.0, 1.0)
FAILURES = (TarflowError, RuntimeError, MemoryError)  # one that cannot run must not cost the others their times
Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one task: medians over turns in which all took part. Ratios are None if the other did not."""

    name: str
    seconds: float
    estimated: bool
    over_published: float | None
    over_compiled: float | None
    error: float | None  # largest difference from float32
    certificate: float | None
    passes: int


@dataclass(frozen=True, slots=True)
class Cell:
    """All rows of one batch size and guidance; ``floor`` in seconds, ``notes`` on who did not run and why."""

    batch: int
    guidance: float
    floor: float
    rows: list[Row]
    notes: list[str]


@dataclass(slots=True)
class Run:
    """One contender's turns in a cell."""

    entrant: Entrant
    error: float | None = None
    certificate: float | None = None
    seconds: list[float] = field(default_factory=list)


def bench(
    bundle: Bundle, choice: Choice, batches: Sequence[int], repeats: int, speed: float, watch: Watch
) -> Iterator[Cell]:
    """Every batch size, unguided and guided. ``speed`` of the device's memory, bytes/s, is what the floor stands on."""
    rivals = Rivals(load(bundle.folder), choice)
    config = bundle.manifest.config
    for batch in batches:
        for guidance in GUIDANCE:
            noise = normal(0, range(batch), (config.tokens, config.patch_dim))
            task = Task(noise, np.arange(batch) % config.classes, guidance)
            steps = config.blocks * (config.tokens - 1)
            floor = steps * floor_bytes(rivals.model, batch * (2 if guidance else 1)) / speed
            rows, notes = compete(bundle, rivals, task, repeats, watch)
            yield Cell(batch, guidance, floor, rows, notes)


def compete(bundle: Bundle, rivals: Rivals, task: Task, repeats: int, watch: Watch) -> tuple[list[Row], list[str]]:
    """Let all who can draw one task by turns; each draws it once before, for its error and to be warm."""
    where = f"batch {len(task.noise)}, guidance {task.guidance:g}"
    entrants, flows, notes = assemble(bundle, rivals)
    judge = next(iter(flows.values()), None)
    watch(f"{where}: float32")
    truth = rivals.truth(task)
    runs = []
    for entrant in entrants:
        watch(f"{where}: {entrant.name}")
        with noting(entrant.name, notes):
            runs.append(warm(entrant, task, truth, judge, rivals.choice.patience))
    for turn in range(repeats):
        for run in list(runs):
            watch(f"{where}: turn {turn + 1} of {repeats}, {run.entrant.name}")
            with noting(run.entrant.name, notes, partial(runs.remove, run)):
                run.seconds.append(run.entrant.seconds(task))
    notes += [f"{name}: {flow.backend.description}" for name, flow in flows.items()]  # now it knows all fallbacks
    roles = {run.entrant.role: run for run in runs}
    return [row(run, roles.get("published"), roles.get("compiled")) for run in runs], notes


def assemble(bundle: Bundle, rivals: Rivals) -> tuple[list[Entrant], dict[str, Flow], list[str]]:
    """The field, the flows in it, the first of which certifies what all draw, and notes on who is missing."""
    entrants, flows = [rivals.published(), rivals.compiled()], {}
    notes: list[str] = []
    for name, opened in ours(bundle, rivals.choice).items():
        with noting(name, notes):
            flows[name], found = opened(name)
            entrants += found
    return entrants, flows, notes


def warm(entrant: Entrant, task: Task, truth: Array, judge: Flow | None, patience: float) -> Run:
    """A first draw, untimed, and what is wrong with it; only an estimate where drawing would take too long."""
    if entrant.estimated and entrant.seconds(task) > patience:
        return Run(entrant, None, None)
    images = entrant.draw(task)
    error = float(np.abs(images - truth).max())
    if judge is None or not np.isfinite(images).all():
        return Run(entrant, error, None)
    guidance = Guidance(task.guidance)
    return Run(entrant, error, float(judge.certify(images, task.noise, task.labels, guidance).max()))


def row(run: Run, published: Run | None, compiled: Run | None) -> Row:
    over_published, over_compiled = (
        median(theirs / own for theirs, own in zip(other.seconds, run.seconds, strict=True)) if other else None
        for other in (published, compiled)
    )
    entrant = run.entrant
    return Row(
        entrant.name,
        median(run.seconds),
        entrant.estimated,
        over_published,
        over_compiled,
        run.error,
        run.certificate,
        sum(entrant.contender.passes()),
    )


@contextlib.contextmanager
def noting(name: str, notes: list[str], otherwise: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn a failure of one contender into a note."""
    try:
        yield
    except FAILURES as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        notes.append(f"{name} did not run: {line}")
        otherwise()
