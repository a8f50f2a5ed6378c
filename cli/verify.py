"""``tarflow verify``: is this bundle still what PyTorch says it is?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import emit, stages
from .options import Channels, Json, NoiseStd, PatchSize, Provider


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CHECKPOINT]", help="Compare with this. Default: the bundle's own weights."),
    ] = None,
    patch_size: PatchSize = None,
    channels: Channels = None,
    noise_std: NoiseStd = None,
    provider: Provider = "cpu",
    json: Json = False,
) -> None:
    """Compare a bundle with PyTorch where it is installed, else with its golden pairs, and certify round trips.

    Exit code 1 if anything is out of the precision's tolerance.

    Example: tarflow verify tarflow-bundle digits_model_2_128_4_3_0.10.pth
    """
    from ..quality.parity import failures, verify_golden
    from ..runtime.errors import CheckFailed
    from ..runtime.flow import Flow

    with stages(quiet=json) as watch:
        if checkpoint is not None or _has_pytorch():
            from tarflow.config import Hints

            from ..export.pipeline import verify_bundle

            card = verify_bundle(bundle, checkpoint, Hints(patch_size, channels, noise_std), provider, watch)
        else:
            watch("verify golden pairs")
            flow = Flow.open(bundle, provider)
            card = verify_golden(flow)
    wrong = failures(card)
    if json:
        emit({"bundle": str(bundle), "ok": not wrong, "failures": wrong, **card})
    else:
        _print_card(card)
    if wrong:
        raise CheckFailed(
            f"'{bundle}' is out of tolerance:\n  "
            + "\n  ".join(wrong)
            + f"\nFind the place with: tarflow bisect '{bundle}'"
        )
    if not json:
        print("within tolerance")


def _print_card(card: dict[str, Any]) -> None:
    print(f"{card['backend']} against {card['oracle']}: {card['method']}, {card['samples']} samples")
    print(f"  {'':<10} {'cosine':>12} {'norm ratio':>11} {'rms':>9} {'p99':>9} {'max':>9}")
    rows = [(f"block {block['block']}", block) for block in card.get("blocks", ())]
    rows += [(part, card[part]) for part in ("guided", "resident", "sample", "denoised", "golden") if part in card]
    for name, d in rows:
        print(
            f"  {name:<10} {d['cosine']:12.9f} {d['norm_ratio']:11.7f} {d['rms']:9.2g} {d['p99']:9.2g} {d['max']:9.2g}"
        )
    print(f"  certificate {card['certificate']:.2g}")
    if "bits_per_dim_shift" in card:
        print(f"  largest shift of bits/dim {card['bits_per_dim_shift']:.2g}")


def _has_pytorch() -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("torch", "onnx", "onnxscript", "onnx_ir"))
