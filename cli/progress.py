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
    from ..runtime.samples import Progress

_LINE_EVERY = 5.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def bar(what: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; what it yields is told ``completed``, ``total`` and ``description``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True, no_color="NO_COLOR" in os.environ)) as shown:
        yield partial(shown.update, shown.add_task(what, total=total, completed=done))


@contextlib.contextmanager
def step_bar(what: str) -> Iterator[Callable[[Progress], None] | None]:
    """A bar over sequential steps; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with bar(what, None) as update:
        yield lambda now: update(completed=now.done, total=now.total, description=_description(what, now))


def _description(what: str, now: Progress) -> str:
    return what if now.block < 0 else f"{what}, block {now.block}"  # no block: all of them run at once


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
def sample_bar(total: int, done: int) -> Iterator[Callable[[float], None]]:
    """Is told how many of ``total`` samples are drawn by now: a bar on a terminal, elsewhere a line every few seconds,
    with the rate and an estimate that leave out the ``done`` samples found at the start.
    """
    started = time.monotonic()
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
