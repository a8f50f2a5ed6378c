"""What the commands share: where results and messages go, progress, and how files are read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.flow import Progress

DEMO = Path(__file__).parent.parent / "demo"
DEFAULT_BUNDLE = Path("tarflow-bundle")
_LINE_EVERY = 5.0  # seconds between lines of progress where there is no terminal


def default_bundle(bundle: Path | None) -> Path:
    """The bundle named, else ./tarflow-bundle if it is there, else the demo that ships with the package."""
    if bundle is not None:
        return bundle
    return DEFAULT_BUNDLE if DEFAULT_BUNDLE.exists() else DEMO


def emit(document: dict[str, Any]) -> None:
    """One JSON document on stdout; numbers JSON has no word for become null."""
    print(json.dumps(_finite(document), indent=1, allow_nan=False))


def say(message: str) -> None:
    """A line for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def show(rows: list[tuple[str, str]], title: str | None = None) -> None:
    """A two-column list on stdout."""
    if title:
        print(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def parse_sizes(batch: str) -> list[int]:
    """Batch sizes from "1,8,32". Raises InputError."""
    try:
        sizes = [int(size) for size in batch.split(",")]
    except ValueError:
        raise InputError.of("batch", f"'{batch}'", "a list of numbers, such as 1,8,32") from None
    if min(sizes) < 1:
        raise InputError.of("batch", f"'{batch}'", "sizes of 1 or more")
    return sizes


@contextlib.contextmanager
def step_bar(what: str) -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar over sequential steps, on stderr; nothing when that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, no_color="NO_COLOR" in os.environ)
    with Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(what, total=None)

        def advance(progress: Progress) -> None:
            description = f"{what}, block {progress.block}"
            bar.update(task, completed=progress.done, total=progress.total, description=description)

        yield advance


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
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that each call replaces; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True, no_color="NO_COLOR" in os.environ).status("") as status:
        yield status.update


@contextlib.contextmanager
def sample_bar(total: int, done: int) -> Iterator[Callable[[float], None]]:
    """Is told how many of ``total`` samples are drawn by now: a bar on a terminal, elsewhere a line every few seconds,
    with the rate and an estimate that leave out the ``done`` samples found at the start.
    """
    started = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Bar(*columns, console=Console(stderr=True, no_color="NO_COLOR" in os.environ)) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda now: bar.update(task, completed=int(now))
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


def read_array(path: Path, what: str) -> NDArray[Any]:
    """A .npy file, never unpickled. Raises InputError."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"no file '{path}' for {what}; expected an array saved with numpy.save")
    try:
        with path.open("rb") as file:  # numpy leaves it open when it is a damaged zip
            array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' is not an .npy array ({str(error)[:100]}); save {what} with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"'{path}' holds several arrays; expected one, saved with numpy.save")
    return array


def parse_labels(text: str | None, first: int, count: int) -> NDArray[np.int64] | None:
    """``3``, ``0-9``, ``1,4,7-9``, ``-1`` (the null class) or ``y.npy`` -> one label a sample.

    Ranges and lists are dealt out by sample index, so that sample i has the same label whoever draws it.
    """
    import numpy as np

    if text is None:
        return None
    if text.endswith(".npy"):
        labels = read_array(Path(text), "labels")
        if labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu":
            raise InputError(
                f"'{text}' holds {labels.dtype} of shape {labels.shape}; expected {count} integers, one a sample"
            )
        return labels
    choices = label_choices(text)
    return np.array(choices, np.int64)[(first % len(choices) + np.arange(count)) % len(choices)]


def label_choices(text: str) -> list[int]:
    """The classes that a text such as ``1,4,7-9`` deals out in turn. Raises InputError."""
    choices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)-(\d+)|(-?\d+))\s*", part)
        if not match:
            raise InputError(
                f"labels '{text}' are not understood; expected a class (3), a range (0-9), a list (1,4,7) or y.npy"
            )
        low, high, single = match.groups()
        if max(map(len, filter(None, match.groups()))) > 9:
            raise InputError(f"labels '{part}' are out of range; no model has that many classes")
        span = range(int(low), int(high) + 1) if single is None else range(int(single), int(single) + 1)
        if not span or len(span) > 1_000_000:
            raise InputError(f"labels '{part}' are an empty or endless range; write the smaller class first, as in 0-9")
        choices += span
    return choices


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
