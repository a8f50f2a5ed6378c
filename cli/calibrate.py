"""``tarflow calibrate``: find out what is fastest on this machine, and remember it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from ..runtime.opening import Opening
from .console import emit, parse_sizes
from .options import BundleArgument, Json, Quiet, opens
from .progress import share_bar


@opens
def calibrate(
    bundle: BundleArgument,
    batch: Annotated[str, Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    samples: Annotated[int, Option(help="Samples that are drawn for each batch size.")] = 24,
    *,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure each block, serially and in parallel windows, and keep the fastest of each as this machine's plan.

    Sampling follows the plan from then on: see generate --decode. A plan is kept in the bundle's folder, by provider
    and device; without a gain of 5 % a block stays serial.

    Example: tarflow calibrate tarflow-bundle
    """
    from ..runtime.calibrate import calibrate as measure
    from ..runtime.flow import Flow
    from ..runtime.plan import check_place

    sizes = parse_sizes(batch)
    flow = Flow.open(bundle, opening)
    path = check_place(flow.bundle, flow.backend.machine)  # now, not after the measurements
    with share_bar("calibrating", quiet) as tell:
        plan = measure(flow, sizes, samples, lambda done, total, now: tell(done / total, f"{done} of {total}: {now}"))
    plan.write(flow.bundle)
    if json:
        emit(plan=path, **asdict(plan))
        return
    for mode, rows in plan.modes.items():
        print(f"{mode}:")
        for row in rows:
            windows = ", ".join("serial" if w == 1 else str(w) for w in row.windows)
            if row.lanes > 1:
                windows += f", in {row.lanes} lanes"
            what = f"batch {row.rows // row.branches:>3}{', guided' if row.branches > 1 else ''}"
            print(f"  {what}: {row.speedup:.2f}x serial, windows of blocks 0 ...: {windows}")
    print(f"kept in {path}")
