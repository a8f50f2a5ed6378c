"""``tarflow generate``: draw samples."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..runtime.bundle import Bundle
from ..runtime.files import check_room, size_text
from ..runtime.opening import Opening
from .console import emit, few, identity, read_array, tell_of_classes
from .images import Save, files_asked, write_images
from .options import BundleArgument, Drawing, Json, Labels, Quiet, Ray, draws, opens
from .progress import step_bar
from .verdict import Strict, Verdict, round_trip_text

if TYPE_CHECKING:
    from ..runtime.samples import Report


@opens
@draws()
def generate(
    bundle: BundleArgument,
    n: Annotated[int | None, Option("--n", help="How many samples. Default: 64, or as many as --noise has.")] = None,
    labels: Labels = None,
    *,
    drawing: Drawing,
    noise: Annotated[Path | None, Option(help="Noise (N, T, D) as .npy, instead of a seed.")] = None,
    save: Save = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="Picture: .png, .jpg or .webp. Default: samples.png if no --save.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder for many samples, in shards; a second run continues it.")] = None,
    format: Annotated[str | None, Option(help="npy (default), safetensors, png (folders) or tar (webdataset).")] = None,
    shard_size: Annotated[int | None, Option(help="Samples in a shard, a multiple of 16. Default: 1024.")] = None,
    workers: Annotated[
        int | None, Option(help="Processes that draw shards. Default: 1; with --ray, one a GPU or a machine.")
    ] = None,
    ray: Ray = None,
    opening: Opening,
    strict: Strict = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Draw samples from a bundle: noise, inverted block by block, denoised, as a picture or an array.

    Example: tarflow generate --n 64 --labels 0-9 --guidance 1 -o digits.png

    Many, in shards that are never drawn twice: tarflow generate --n 50000 --labels 0-9 --out digits --workers 2
    """
    from ..runtime.flow import Flow
    from ..runtime.inputs import check_noise
    from ..runtime.samples import Watch
    from ..shards.engine import on_engine
    from ..shards.job import DEFAULT_SHARD, Job
    from .shards import WITH_OUT, WITHOUT_OUT, Means, Telling, draw_shards, engine_for, refuse

    if out is not None:
        refuse(WITH_OUT, noise=noise, save=save, output=output, batch_size=drawing.said["batch_size"])
        request = drawing.request(bundle.manifest.config, 64 if n is None else n, labels)
        size = DEFAULT_SHARD if shard_size is None else shard_size
        engine = engine_for(bundle, out, ray, opening)
        job = Job.of(bundle, request, format or "npy", size, engine)
        draw_shards(bundle, job, out, Means(workers, ray, on_engine(engine, opening), quiet), Telling(json, strict))
        return
    refuse(WITHOUT_OUT, format=format, shard_size=shard_size, workers=workers, ray=ray)
    array = read_array(noise, "noise") if noise is not None else None
    latents, n = check_noise(bundle.manifest.config, 64 if n is None and array is None else n, array)
    request = drawing.request(bundle.manifest.config, n, labels)
    files = files_asked(save, output, "samples.png")
    if save is not None:
        check_room(save, 4 * n * math.prod(bundle.manifest.config.image))
    flow = Flow.open(bundle, opening)
    tell_of_classes(bundle, request.labels)
    with step_bar("sampling", request.certify or request.strength is not None, quiet) as steps:
        samples = flow.draw(request, latents, Watch(steps.step, stage=steps.stage))
    report = samples.report
    text = {
        "seed": "given noise" if report.seed is None else str(report.seed),
        "sample_indices": f"{report.samples[0]}-{report.samples[-1]}",
    }
    write_images(samples, files, bundle, text)
    if json:
        drawn = asdict(report) | {"suspects": report.suspects, "uncertified": report.uncertified}
        certificate, seconds = drawn.pop("certificate"), drawn.pop("certificate_seconds")
        drawn["first_sample"] = drawn.pop("samples")[0]
        drawn["log_prob"] = None if report.log_prob is None else report.log_prob.tolist()
        if certificate is not None:
            largest = {"max": report.largest_certificate}
            certificate = {**largest, "per_sample": certificate.tolist(), "seconds": seconds}
        about = {**identity(bundle), "precision": bundle.manifest.precision, "n": n}
        emit(**about, files=files, certificate=certificate, **drawn)
    else:
        _tell(bundle, report, n, files, opening)
    cure = _cure(report, request.redraw_nonfinite)
    Verdict(n, report.nonfinite, report.uncertified, report.suspects, report.suspect_above, cure).tell(strict)


def _cure(report: Report, redrawn: bool) -> str:
    """What to do about samples that are not finite."""
    if not redrawn:
        return "Lower the guidance, or pass --redraw-nonfinite to draw just those again"
    drawn = [i for i in report.nonfinite if i in set(report.redrawn)]
    others = len(report.nonfinite) - len(drawn)
    found = [f"{len(drawn)} stayed so when drawn again"] * bool(drawn)
    found += [f"{others} overflow not when drawn but when denoised, and were not drawn again"] * bool(others)
    return f"{'; '.join(found)}: lower the guidance"


def _tell(bundle: Bundle, report: Report, n: int, files: dict[str, Path], opening: Opening) -> None:
    import numpy as np

    where = ", ".join(map(str, files.values()))
    print(f"{n} samples of {bundle.manifest.name} in {report.seconds:.2f} s on {report.backend}: {where}")
    if opening.memory is not None:
        limit = f", of {size_text(opening.memory)}" if isinstance(opening.memory, int) else ""
        print(f"memory: {size_text(report.peak_memory)} at peak{limit}")
    if report.certificate is not None:
        print(f"{round_trip_text(report.largest_certificate)}, checked in {report.certificate_seconds:.2f} s")
    if report.log_prob is not None and len(known := report.log_prob[np.isfinite(report.log_prob)]):
        print(f"log-density {known.min():.6g} to {known.max():.6g} nats, {report.density}")
    if report.decoding != "serial":
        print(f"decoded {report.decoding}: {sum(report.passes)} dependent passes")
    if report.redrawn:
        print(f"redrawn because not finite: samples {few(report.redrawn)}")
    print(report.level)
