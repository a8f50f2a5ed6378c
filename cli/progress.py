"""How far a long command is, on stderr: a bar or a line that moves on a terminal, timed lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from .console import say

if TYPE_CHECKING:
    from ..runtime.samples import Progress, Stage

    Tell = Callable[..., None]

_LINE_EVERY = 5.0  # seconds between lines about shards, where there is no terminal
QUIET_FOR = 10.0  # seconds until the first line about other things, and between two
_STAGES = 0.1  # of a run's time, more or less: certifying and denoising


@contextlib.contextmanager
def bar(what: str, total: int | None, done: int = 0, percent: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; what it yields is told ``completed``, ``total`` and ``description``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    count = TaskProgressColumn() if percent else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True, no_color="NO_COLOR" in os.environ)) as shown:
        yield partial(shown.update, shown.add_task(what, total=total, completed=done))


@contextlib.contextmanager
def share_bar(what: str, quiet: bool = False) -> Iterator[Tell]:
    """Is told what share of a task is done, 0 to 1, and what of it goes on: a bar on a terminal; elsewhere a line now
    and then, with an estimate, if the task takes longer than ten seconds.
    """
    if quiet:
        yield lambda share, now="": None
        return
    if sys.stderr.isatty():
        with bar(what, 1000, percent=True) as update:
            yield lambda share, now="": update(completed=1000 * share, description=f"{what}, {now}" if now else what)
        return
    started = latest = time.monotonic()

    def line(share: float, now: str = "") -> None:
        nonlocal latest
        moment = time.monotonic()
        if moment - started < QUIET_FOR or moment - latest < QUIET_FOR:
            return
        latest, spent = moment, moment - started
        left = f", about {duration_text(spent * (1 - share) / share)} left" if share > 0 else ""
        say(f"[{spent:6.1f} s] {what}: {100 * share:.0f} %{f', {now}' if now else ''}{left}")

    yield line


class Steps:
    """A run's progress as a share of the whole, certifying and denoising included where they come (``staged``). What is
    ``within`` part of a task, is told as the part's ``share`` behind what was done ``before``.
    """

    def __init__(self, tell: Tell, staged: bool, before: float = 0.0, share: float = 1.0) -> None:
        self._tell, self._staged, self._before, self._share = tell, staged, before, share
        self._decoded = self._checked = 0.0

    def within(self, before: float, share: float) -> Steps:
        return Steps(self._tell, self._staged, before, share)

    def step(self, now: Progress) -> None:
        self._decoded = now.done / now.total if now.total else 1.0
        self._say(f"block {now.block}" if now.block >= 0 else "")  # of no block: all of them run at once

    def stage(self, now: Stage) -> None:
        self._checked = now.done / now.total
        self._say({"certify": "certifying", "denoise": "denoising"}[now.name])

    def _say(self, what: str) -> None:
        done = (1 - _STAGES) * self._decoded + _STAGES * self._checked if self._staged else self._decoded
        self._tell(self._before + self._share * done, what)


@contextlib.contextmanager
def step_bar(what: str, staged: bool = False, quiet: bool = False) -> Iterator[Steps]:
    """The progress of a run: see :func:`share_bar`."""
    with share_bar(what, quiet) as tell:
        yield Steps(tell, staged)


@contextlib.contextmanager
def stages(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Names the stage of a long task: a spinner on a terminal, timed lines elsewhere."""
    started = time.monotonic()
    if quiet:
        yield lambda stage: None
    elif sys.stderr.isatty():
        with status_line() as line:
            yield lambda stage: line(f"{stage}  ({time.monotonic() - started:.0f} s)")
    else:
        yield lambda stage: say(f"[{time.monotonic() - started:6.1f} s] {stage}")


@contextlib.contextmanager
def status_line(text: str = "") -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that each call replaces; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True, no_color="NO_COLOR" in os.environ).status(text) as status:
        yield status.update


@contextlib.contextmanager
def sample_bar(total: int, done: int, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Is told how many of ``total`` samples are drawn by now: a bar on a terminal, elsewhere a line every few seconds,
    with the rate and an estimate that leave out the ``done`` samples found at the start.
    """
    started = time.monotonic()
    if quiet:
        yield lambda now: None
        return
    if sys.stderr.isatty():
        with bar("samples", total, done) as update:
            yield lambda now: update(completed=int(now))
        return
    first: tuple[float, float] | None = None  # moment and samples of the first news: workers take time to start
    latest, told = started, float(done)

    def line(now: float) -> None:
        nonlocal first, latest, told
        moment = time.monotonic()
        first = first or (moment, now)
        if now == told or (moment - latest < _LINE_EVERY and now < total):
            return
        latest, told = moment, now
        rate = (now - first[1]) / (moment - first[0]) if moment > first[0] else 0.0
        estimate = f", {rate:.3g} a second, {duration_text((total - now) / rate)} left" if rate else ""
        say(f"[{moment - started:6.1f} s] {now:.0f} of {total} samples{estimate}")

    yield line


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
