"""``tarflow build``: a bundle's graphs become TensorRT engines for the GPU here."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..runtime.errors import InputError
from ..runtime.files import size_text
from .console import emit, numbers, say
from .options import BundleArgument, Json, Quiet
from .progress import stages, status_line

if TYPE_CHECKING:
    from ..export.engines.progress import Headway
    from ..runtime.tensorrt.record import Record


def build(
    bundle: BundleArgument,
    engine: Annotated[str | None, Option(help="Precision to build: fp32, fp16 or bf16. Default: the bundle's.")] = None,
    batch: Annotated[str, Option(metavar="MIN,OPT,MAX", help="Batch sizes the engines take.")] = "1,8,32",
    window: Annotated[str, Option(metavar="MIN,OPT,MAX", help="Positions a step solves at once.")] = "1",
    device: Annotated[
        str | None,
        Option(
            metavar="CAPABILITIES",
            help="Compute capabilities to build for, as in 8.6,8.9: any such GPU. Default: the GPU here; without one, "
            "all that TensorRT-RTX knows.",
        ),
    ] = None,
    timing_cache: Annotated[Path | None, Option(help="Keep TensorRT's timings here; only makes builds faster.")] = None,
    level: Annotated[int | None, Option(metavar="N", help="TensorRT's optimisation level, 0 to 5.")] = None,
    verify: Annotated[bool, Option(help="Run every engine against ONNX Runtime, if a GPU is here.")] = True,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Build TensorRT engines from a bundle, on the machine that will run them: one per block and graph.

    An engine whose precision is not what was asked is not kept (exit code 1). Interrupted builds go on where they were.

    Example: tarflow build imagenet64 --engine fp16 --batch 1,8,32
    """
    from ..export.engines.build import build as build_engines
    from ..export.engines.options import Options
    from ..export.engines.parity import verify_engines

    ranges = _range("batch", batch), _range("window", window)
    options = Options(*ranges, _capabilities(device), timing_cache=timing_cache, level=level)
    with shown(quiet=json or quiet) as watch:
        folder, record = build_engines(bundle, engine, options, watch)
    if verify:
        with stages(quiet=json or quiet) as tell:
            record, unverified = verify_engines(bundle, folder, record, tell)
    else:
        unverified = "not asked for"
    if json:
        emit(folder=folder, unverified=unverified, **asdict(record))
        return
    print(f"{folder}: {_summary(record)}")
    if unverified:
        say(f"built, not run: {unverified}")


def _summary(record: Record) -> str:
    engines = record.engines.values()
    attested = {engine.attested for engine in engines}
    return (
        f"{len(engines)} engines, {size_text(sum(engine.size for engine in engines))}, {record.package} "
        f"{record.version} for {record.target}; {'/'.join(sorted({engine.built for engine in engines}))} read back "
        f"from every {' and '.join(sorted(attested))}"
    )


@contextlib.contextmanager
def shown(quiet: bool) -> Iterator[Callable[[Headway], None]]:
    """Progress for people: one line that moves on a terminal, a line for each engine elsewhere."""
    if quiet:
        yield lambda headway: None
        return
    with status_line() as line:
        last = ""

        def watch(headway: Headway) -> None:
            nonlocal last
            place = f"engine {headway.done} of {headway.total}, {headway.name}"
            left = f", about {headway.left:.0f} s left" if headway.left is not None else ""
            if headway.kept:
                say(f"{place}: kept")
            elif sys.stderr.isatty():
                line(f"{place}: {100 * headway.fraction:.0f} %, {headway.elapsed:.0f} s{left}")
            elif headway.name != last:
                say(f"[{headway.elapsed:6.1f} s{left}] {place}")
            last = headway.name

        yield watch


def _range(name: str, text: str) -> tuple[int, int, int]:
    """``8`` or ``1,8,32``."""
    found = numbers(text)
    if len(found) not in (1, 3):
        raise InputError(f"--{name} '{text}' is not understood; expected MIN,OPT,MAX, as in 1,8,32, or one number")
    return (found[0], found[1], found[2]) if len(found) == 3 else (1, found[0], found[0])


def _capabilities(text: str | None) -> tuple[str, ...] | None:
    """``8.6,8.9`` or ``sm86,sm89``."""
    if text is None:
        return None
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:sm_?)?(\d+)\.?(\d)\s*", part, re.I)
        if not match:
            raise InputError(f"--device '{part}' is not understood; expected compute capabilities, as in 8.6,8.9")
        found.append(f"{match[1]}.{match[2]}")
    return tuple(dict.fromkeys(found))
