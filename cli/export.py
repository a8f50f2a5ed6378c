"""``tarflow export``: a checkpoint becomes a bundle."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ..config import Hints
from ..runtime.bundle import Bundle
from ..runtime.errors import MachineError, Remedy, briefly
from ..runtime.files import size_text
from .console import DEFAULT_BUNDLE, DEMO, emit, identity, say, show
from .inspect import model_rows
from .messages import command
from .options import Json, Quiet, hinted
from .progress import stages

if TYPE_CHECKING:
    from ..export.estimate import Estimate


@hinted
def export(
    checkpoint: Annotated[
        Path | None, Argument(help=".pth, .safetensors, a bundle, or hf:OWNER/REPO/FILE@REVISION. Default: the demo.")
    ] = None,
    output: Annotated[Path, Option("-o", "--output", help="The bundle to make.")] = DEFAULT_BUNDLE,
    engine: Annotated[str, Option(help="Precision of the graphs: fp32, fp16, bf16, or int8 (weights alone).")] = "fp32",
    *,
    hints: Hints,
    verify: Annotated[bool, Option(help="Compare with PyTorch before it appears.")] = True,
    build: Annotated[bool, Option(help="End in TensorRT engines, where TensorRT is installed.")] = True,
    class_names: Annotated[
        Path | None,
        Option(help="File with what the classes are called, one a line. Default: what training left beside it."),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace an existing bundle.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be written, and stop.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, one set per flow block, verified against PyTorch.

    Example: tarflow export imagenet_model_2_768_8_8_0.05.pth -o imagenet64 --engine fp16
    """
    hints = replace(hints, class_names=class_names)
    source = checkpoint if checkpoint is not None else DEMO
    if dry_run:
        from ..export.estimate import estimate

        _print_estimate(estimate(source, engine, hints), output, json)
        return
    from ..export.pipeline import export as export_bundle
    from ..quality.card import Card

    with stages(quiet) as watch:
        bundle = export_bundle(source, output, engine, hints, force, verify, watch)
    engines, why_not, unverified = _engines(bundle, quiet=json or quiet) if build else (None, "not asked for", None)
    files, parity = {name: entry.size for name, entry in bundle.manifest.files.items()}, bundle.manifest.parity
    total = sum(files.values())
    if json:
        built = {"engines": engines, "engines_missing": why_not, "engines_unverified": unverified}
        about = {"config": asdict(bundle.manifest.config), "noise_from": bundle.manifest.noise_from}
        emit(**identity(bundle), precision=engine, **about, bytes=total, files=files, parity=parity, **built)
        return
    print(f"{output}: {len(files) + 1} files, {size_text(total)}, {engine}")
    show(model_rows(bundle.manifest.config, bundle.manifest.noise_from, bundle.manifest.class_names))
    if parity:
        card = Card.from_json(parity, str(output))
        worst = max(difference.rms for difference in card.blocks.values())
        scores = f"bits/dim {card.bits_per_dim_shift:.2g}, round trip {card.certificate:.2g}"
        print(f"against PyTorch: blocks rms {worst:.2g} at most, {scores}")
    else:
        say(f"not verified; run: {command(Remedy('verify', {'bundle': output}))}")
    if engines:
        print(f"engines: {engines}" + (", built, not run" if unverified else ""))
        if unverified:
            say(f"engines were built, not run: {unverified}")
    elif build:
        cure = f"; on a GPU machine run: {command(Remedy('build', {'bundle': output}))}" if engine != "int8" else ""
        say(f"no engines: {why_not}{cure}")


def _engines(bundle: Bundle, quiet: bool) -> tuple[str | None, str | None, str | None]:
    """The folder of engines just built, or why there are none (the machine, never the bundle), or why none was run."""
    from ..export.engines.build import build
    from ..export.engines.parity import verify_engines
    from .build import shown

    if bundle.manifest.precision == "int8":
        return None, "an int8 engine's precision cannot be read back yet, so none is built", None
    try:
        with shown(quiet) as watch:
            folder, record = build(bundle, watch=watch)
        _, unverified = verify_engines(bundle, folder, record)
    except MachineError as error:
        return None, briefly(error), None
    return str(folder), None, unverified


def _print_estimate(estimate: Estimate, output: Path, json: bool) -> None:
    total = sum(estimate.files.values())
    if json:
        emit(bundle=output, **asdict(estimate), bytes=total)
        return
    show(
        [
            ("name", estimate.name),
            *model_rows(estimate.config, estimate.noise_from),
            ("precision", estimate.precision),
            ("memory", f"about {size_text(estimate.peak_memory)} at peak"),
            ("time", f"about {estimate.seconds:.0f} s, verification included"),
            ("files", f"{len(estimate.files)}, about {size_text(total)}"),
            *((f"  {name}", size_text(size)) for name, size in estimate.files.items()),
        ],
        f"would write {output}",
    )
