"""``tarflow bisect``: where does a bundle leave PyTorch?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from ..config import Hints
from ..runtime.files import check_replaceable
from ..runtime.opening import Opening
from .console import emit
from .options import BundlePath, Json, Quiet, hinted, opens
from .progress import stages


@opens
@hinted
def bisect(
    bundle: BundlePath,
    checkpoint: Annotated[Path | None, Argument(help="The truth. Default: the bundle's own weights.")] = None,
    tolerance: Annotated[float | None, Option(help="Largest absolute error. Default: 10 x the rms tolerance.")] = None,
    output: Annotated[Path, Option("-o", "--output", help="Repro folder to write.")] = Path("tarflow-bisect"),
    force: Annotated[bool, Option("--force", help="Replace an existing repro folder.")] = False,
    *,
    hints: Hints,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Name the first block, step and graph node that leaves tolerance of PyTorch, and write a folder that shows it.

    Exit code 1 if there is one, 0 if every graph of every block is within tolerance.

    Example: tarflow bisect tarflow-bundle digits_model_2_128_4_3_0.10.pth
    """
    from ..export.bisect import bisect_bundle
    from ..export.comparison import Comparison
    from ..export.repro import MARKER, write_repro

    check_replaceable(output, force, MARKER)
    with stages(quiet=json or quiet) as watch:
        comparison = Comparison(bundle, checkpoint, hints, opening)
        finding = bisect_bundle(comparison, tolerance, watch)
        if finding is not None:
            write_repro(output, finding, force)
    if finding is None:
        if json:
            emit(bundle=bundle, found=None)
        else:
            print("every step, forward and gradient graph is within tolerance")
        return
    if json:
        found = finding.to_json()
        emit(bundle=bundle, found={"graph": found.pop("kind"), **found}, repro=output)
    else:
        print(finding.reason)
        if finding.checkpoint_names:
            print(f"in the checkpoint: {', '.join(finding.checkpoint_names)}")
        print(f"error {finding.suspect.error:.3g}; repro in {output}")
    raise Exit(1)
