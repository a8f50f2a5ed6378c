"""``tarflow report``: what a bundle's samples are like, as one page."""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

from typer import Option

from ..runtime.errors import InputError
from ..runtime.files import check_writable, replacing
from ..runtime.opening import Opening
from .console import emit, identity
from .doctor import versions_of
from .images import Range, as_trained_on, read_images
from .options import GUIDANCE, BundleArgument, Drawing, Json, Labels, Quiet, draws, opens
from .progress import status_line
from .verdict import Strict, Verdict, round_trip_text

PACKAGES = ("tarflow", "onnxruntime", "onnxruntime-gpu", "numpy")


@opens
@draws(*GUIDANCE, "seed")
def report(
    bundle: BundleArgument,
    output: Annotated[Path, Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    n: Annotated[int, Option("--n", help="How many samples are drawn.")] = 160,
    labels: Labels = None,
    *,
    drawing: Drawing,
    data: Annotated[
        Path | None, Option(help="Real images to encode too: a folder, or .npy, uint8 or floats in [-1, 1].")
    ] = None,
    range: Range = None,
    data_labels: Annotated[str | None, Option(help="Their labels, as in --labels. Default: sub-folders.")] = None,
    opening: Opening,
    strict: Strict = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Draw samples and write a page about them: pictures, latents, likelihoods, round trips, times, parity, versions.

    One HTML file that loads nothing. Labels are dealt out over all classes unless given.

    Example: tarflow report tarflow-bundle -o report.html --n 400 --guidance 1 --data photos/
    """
    from ..quality.examine import examine
    from ..quality.report import Making, render
    from ..runtime.flow import Flow

    if n < 2:
        raise InputError.of("n", n, "2 samples or more, a hundred or more for statistics")
    check_writable(output)
    request = drawing.request(bundle.manifest.config, n, labels, every_class=True)
    flow = Flow.open(bundle, opening)
    images = None
    if data is not None:
        given = read_images(data, flow.config, range)
        images = as_trained_on(flow, given.pixels, request.seed), given.classes(data_labels, flow.bundle.manifest)
    with contextlib.nullcontext() if quiet else status_line(f"drawing and examining {n} samples"):
        found = examine(flow, request, images)
    versions = {**versions_of(PACKAGES), "python": platform.python_version(), "system": platform.platform()}
    page = render(found, Making(shlex.join(["tarflow", *sys.argv[1:]]), time.strftime("%Y-%m-%d"), versions))
    with replacing(output) as file:
        file.write(page.encode(errors="backslashreplace"))

    bits = {p.name: float(p.bits.mean()) for p in found.populations}
    if json:
        about = {**identity(bundle), "backend": found.report.backend, "report": output, "n": n, "seed": request.seed}
        about |= {"guidance": request.guidance.scale, "certificate": found.report.largest_certificate}
        about |= {"suspects": found.report.suspects, "suspect_above": found.report.suspect_above}
        emit(**about, nonfinite=found.nonfinite, mean_bits_per_dim=bits, block_seconds=found.block_seconds)
    else:
        likelihoods = ", ".join(f"{value:.3f} bits/dim of {name}" for name, value in bits.items())
        print(f"{output}: {n} samples, {likelihoods}, {round_trip_text(found.report.largest_certificate)}")
    drawn = found.report
    uncertified = [i for i in drawn.uncertified if i not in found.nonfinite]
    cure = "Lower the guidance"
    Verdict(n, found.nonfinite, uncertified, drawn.suspects, drawn.suspect_above, cure).tell(strict)
