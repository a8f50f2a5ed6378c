"""``tarflow verify``: is this bundle still what PyTorch says it is?"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Argument

from ..config import Hints
from ..runtime.errors import CheckFailed, Remedy
from ..runtime.opening import Opening
from .console import emit
from .options import BundlePath, Json, Quiet, hinted, opens
from .progress import stages


@opens
@hinted
def verify(
    bundle: BundlePath,
    checkpoint: Annotated[Path | None, Argument(help="Compare with this. Default: the bundle's own weights.")] = None,
    *,
    hints: Hints,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare a bundle with PyTorch where it is installed, else with its golden pairs, and certify round trips.

    Exit code 1 if anything is out of the precision's tolerance.

    Example: tarflow verify tarflow-bundle digits_model_2_128_4_3_0.10.pth
    """
    from .card import print_card

    with stages(quiet=json or quiet) as watch:
        if checkpoint is not None or all(map(find_spec, ("torch", "onnx", "onnxscript", "onnx_ir"))):
            from ..export.comparison import Comparison, verify_bundle

            card = verify_bundle(Comparison(bundle, checkpoint, hints, opening), watch)
        else:
            from ..quality.parity import verify_golden
            from ..runtime.flow import Flow
            from ..runtime.providers import native_backends

            watch("verify golden pairs")
            asked = opening.else_on("cpu")
            flow = Flow.open(bundle, asked)
            card = verify_golden(flow, native_backends(flow.bundle) if asked.provider == "cpu" else None)
    wrong = card.failures()
    if json:
        emit(bundle=bundle, ok=not wrong, failures=wrong, **card.to_json())
    else:
        print_card(card)
    if wrong:
        raise CheckFailed(
            f"'{bundle}' is out of tolerance:\n  " + "\n  ".join(wrong) + "\nBisect it to find the place",
            remedy=Remedy("bisect", {"bundle": bundle, "checkpoint": checkpoint}),
        )
    if not json:
        print("within tolerance")
