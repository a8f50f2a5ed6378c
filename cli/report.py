"""``tarflow report``: what a bundle's samples are like, as one page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import default_bundle, emit, parse_labels, read_images, say, status_line
from .options import BundleArgument, Json, Labels, LowMemory, Provider, Spinning, Threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.flow import Flow


def report(
    bundle: BundleArgument = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    n: Annotated[int, typer.Option("--n", help="How many samples are drawn.")] = 160,
    labels: Labels = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0 is none.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise, and of the data's dequantisation.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Real images to encode too: a folder, or .npy, uint8 or floats in [-1, 1].")
    ] = None,
    data_labels: Annotated[str | None, typer.Option(help="Their labels, as in --labels. Default: none.")] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    spinning: Spinning = None,
    low_memory: LowMemory = False,
    json: Json = False,
) -> None:
    """Draw samples and write a page about them: pictures, latents, likelihoods, round trips, times, parity, versions.

    One HTML file that loads nothing. Labels are dealt out over all classes unless given.

    Example: tarflow report tarflow-bundle -o report.html --n 400 --guidance 1 --data photos/
    """
    import time

    import numpy as np

    from ..quality.examine import examine
    from ..quality.report import Making, render
    from ..runtime.bundle import Bundle
    from ..runtime.errors import InputError
    from ..runtime.files import check_writable, replacing
    from ..runtime.flow import Flow, Guidance

    if n < 2:
        raise InputError(f"--n is {n}; expected 2 samples or more, a hundred or more for statistics")
    guided = Guidance(guidance)
    check_writable(output)
    opened = Bundle.open(default_bundle(bundle))
    classes = opened.manifest.config.classes
    dealt = parse_labels(labels if labels is not None or not classes else f"0-{classes - 1}", 0, n)
    flow = Flow.open(opened, provider, threads, spinning, low_memory)
    images = None if data is None else _images(flow, data, data_labels, seed)
    with status_line() as line:
        line(f"drawing and examining {n} samples")
        found = examine(flow, np.full(n, -1, np.int64) if dealt is None else dealt, guided, seed, images)
    page = render(found, Making(_command(), time.strftime("%Y-%m-%d"), _versions()))
    with replacing(output) as file:
        file.write(page.encode())

    bits = {p.name: float(p.bits.mean()) for p in found.populations}
    if json:
        emit(
            {
                "bundle": str(opened.folder),
                "bundle_hash": opened.hash,
                "backend": found.backend,
                "report": str(output),
                "n": n,
                "seed": seed,
                "guidance": guidance,
                "certificate": float(found.certificate.max()),
                "nonfinite": list(found.nonfinite),
                "mean_bits_per_dim": bits,
                "block_seconds": list(found.block_seconds),
            }
        )
    else:
        likelihoods = ", ".join(f"{value:.3f} bits/dim of {name}" for name, value in bits.items())
        print(f"{output}: {n} samples, {likelihoods}, round-trip error {found.certificate.max():.2g} at most")
    if found.nonfinite:
        say(f"tarflow: check failed: {len(found.nonfinite)} of {n} samples are not finite: lower the guidance")
        raise typer.Exit(1)


def _images(flow: Flow, data: Path, labels: str | None, seed: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The data as the model was trained on it, and its labels."""
    from ..runtime.errors import InputError

    stored, _ = read_images(data, flow.config.channels, flow.config.image_size)
    shape = flow.config.image
    if stored.ndim != 4 or stored.shape[1:] != shape or not len(stored) or stored.dtype.kind not in "uf":
        raise InputError(
            f"'{data}' holds {stored.dtype} of shape {stored.shape}; expected (N, {', '.join(map(str, shape))}), uint8 "
            "or floats in [-1, 1]"
        )
    x = flow.dequantise(stored, seed) if stored.dtype == "uint8" else stored
    return x, parse_labels(labels, 0, len(x))


def _command() -> str:
    return shlex.join(["tarflow", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("tarflow", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version(), "system": platform.platform()}
