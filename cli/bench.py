"""``tarflow bench``: how fast does this bundle sample here, in which way, and how far are the ways apart?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.machine import cores
from ..runtime.opening import Opening
from .console import emit, parse_sizes, say
from .options import BundleArgument, Json, Quiet, opens
from .progress import share_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.backend import Array
    from ..runtime.guidance import Guidance
    from ..runtime.measure import Contender, Result


@opens
def bench(
    bundle: BundleArgument,
    against: Annotated[list[Path] | None, Option(help="Also this bundle, of the same model; may be repeated.")] = None,
    rivals: Annotated[bool, Option(help="Also time PyTorch: as published, and compiled. Slow.")] = False,
    batch: Annotated[str, Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    guidance: Annotated[float, Option(help="Guidance scale of the guided rows; 0 leaves them out.")] = 1.0,
    repeats: Annotated[int, Option(help="Rounds, in which all take turns; the median counts.")] = 5,
    *,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time sampling (decoding alone, no denoising) serially and in parallel, exact and fast.

    Beside each time: how often it fits into the first row's; the change of a patch at which parallel decoding stops
    (1e-5 exact, 1e-3 fast), and what errors came of that: the largest difference from the first row's samples, and the
    round trip. The floor: every sequential step must read one block's weights once.

    Example: tarflow bench tarflow-bundle --against tarflow-int8 --batch 1,8,32
    """
    from ..runtime.flow import Flow, Guidance
    from ..runtime.measure import of_flow, race, read_bandwidth, step_floor
    from ..runtime.ways import settles

    sizes = parse_sizes(batch)
    if repeats < 1:
        raise InputError.of("repeats", repeats, "1 or more")
    flow = Flow.open(bundle, opening)
    field = [of_flow(flow, mode, mode) for mode in ("serial", "exact", "fast") if mode == "serial" or settles(flow)]
    for folder in against or ():
        other = Flow.open(folder, opening)
        if other.config != flow.config:
            raise InputError(f"'{folder}' holds another model than '{flow.bundle.folder}'; expected the same")
        modes = ("serial", "fast") if settles(other) else ("serial",)
        field += [of_flow(other, f"{folder.name} {mode}", mode) for mode in modes]
    if rivals:
        field += _rivals(flow.bundle, opening.threads)
        guidance = guidance if flow.config.classes else 0.0  # by temperature alone they cannot
    guided = Guidance(guidance, attention_temperature=1.0 if flow.config.classes else 0.5)
    cases = [(size, g) for size in sizes for g in ([Guidance(), guided] if guidance else [Guidance()])]
    if not json:
        plan = "as calibrated for this machine" if flow.plan else "not calibrated: windows of 64 patches"
        say(f"{flow.backend.description}; parallel decoding {plan}")
        print(
            f"{'':<20} {'batch':>5} {'guided':>6} {'seconds':>9} {'samples/s':>10} {'ratio':>7} {'passes':>7} "
            f"{'stops at':>8} {'error':>8} {'certificate':>11}"
        )
    results: list[Result] = []
    with share_bar("measuring", quiet) as tell:
        timed = _counted(field, len(cases) * len(field) * (repeats + 1), tell)
        for size, g in cases:
            found = race(timed, flow, size, g, repeats)
            results += found
            if not json:
                _print_rows(found)
    bandwidth = read_bandwidth(opening.threads or cores())
    floor = step_floor(flow.bundle, bandwidth)
    if json:
        speed = {"read_bandwidth": bandwidth, "floor_microseconds_per_step": floor * 1e6}
        emit(bundle=bundle.folder, backend=flow.backend.description, rows=[asdict(row) for row in results], **speed)
        return
    steps = flow.config.blocks * (flow.config.tokens - 1)
    limit = f"one block's weights at {bandwidth / 1e9:.1f} GB/s"
    print(f"floor at batch 1: {floor * steps:.4f} s for {steps} serial steps ({limit})")


def _print_rows(found: list[Result]) -> None:
    for row in found:
        stops = "" if row.tolerance is None else f"{row.tolerance:g}"
        print(
            f"{row.name[:20]:<20} {row.batch:>5} {row.guidance:>6g} {row.seconds:>9.4f} "
            f"{row.batch / row.seconds:>10.1f} {row.faster_than(found[0]):>6.2f}x {sum(row.passes) or '':>7} "
            f"{stops:>8} {row.error:>8.1g} {row.certificate:>11.1g}",
            flush=True,
        )


def _counted(field: list[Contender], draws: int, tell: Callable[..., None]) -> list[Contender]:
    """The same field, telling what share of so many draws is done whenever another begins."""
    begun = itertools.count()

    def counted(one: Contender) -> Contender:
        def draw(noise: Array, labels: NDArray[np.int64], guidance: Guidance) -> Array:
            tell(next(begun) / draws, f"{one.name}, batch {len(noise)}")
            return one.draw(noise, labels, guidance)

        return replace(one, draw=draw)

    return [counted(one) for one in field]


def _rivals(bundle: Bundle, threads: int | None) -> list[Contender]:
    """PyTorch on the bundle's own weights. Guidance is what the published method knows: a scale."""
    import torch

    from ..checkpoint import load
    from ..rivals import Compiled, published
    from ..runtime.measure import Contender

    if threads is not None:
        torch.set_num_threads(threads)
    model = load(bundle.folder)

    def contender(name: str, decode: Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]) -> Contender:
        def draw(noise: Array, labels: NDArray[np.int64], guidance: Guidance) -> Array:
            classes = torch.from_numpy(labels) if bundle.manifest.config.classes else None
            images: Array = model.unpatchify(decode(torch.from_numpy(noise), classes, guidance.scale)).numpy()
            return images

        return Contender(f"PyTorch, {name}", draw)

    return [contender("published", partial(published, model)), contender("compiled", Compiled(model))]
