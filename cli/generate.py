"""``tarflow generate``: draw samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.files import size_text
from ..runtime.opening import Opening
from .console import default_bundle, emit, parse_labels, read_array, say
from .options import BundleArgument, Drawing, Json, Labels, Ray, draws, opens
from .progress import step_bar

if TYPE_CHECKING:
    from ..runtime.flow import Flow, Report, Samples


@opens()
@draws()
def generate(
    bundle: BundleArgument = None,
    n: Annotated[
        int | None, typer.Option("--n", help="How many samples. Default: 64, or as many as --noise has.")
    ] = None,
    labels: Labels = None,
    *,
    drawing: Drawing,
    noise: Annotated[Path | None, typer.Option(help="Noise (N, T, D) as .npy, instead of a seed.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write float32 (N, C, H, W), unclipped, as .npy.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Picture of all samples. Default: samples.png, unless --save.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for many samples, in shards; the same command continues it.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of shards: npy (the default), safetensors, png (folders) or tar (webdataset).")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Samples in a shard, a multiple of 16. Default: 1024.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that draw shards. Default: 1; with --ray, one a GPU or a machine.")
    ] = None,
    ray: Ray = None,
    opening: Opening,
    json: Json = False,
) -> None:
    """Draw samples from a bundle: noise, inverted block by block, denoised, as a picture or an array.

    Example: tarflow generate --n 64 --labels 0-9 --guidance 1 -o digits.png

    Many, in shards that are never drawn twice: tarflow generate --n 50000 --labels 0-9 --out digits --workers 2
    """
    from ..runtime.bundle import Bundle
    from ..runtime.errors import InputError
    from ..runtime.files import check_writable
    from ..runtime.flow import Flow
    from ..runtime.inputs import check_noise
    from ..runtime.samples import Watch
    from .shards import Means, draw_shards, job_of, refuse

    drawing.guidance  # noqa: B018 (what is none is refused before anything is opened)
    if out is not None:
        refuse("with --out", noise=noise, save=save, output=output, batch_size=drawing.said["batch_size"])
        opened = Bundle.open(default_bundle(bundle))
        job = job_of(opened, drawing, n if n is not None else 64, labels, format, shard_size)
        draw_shards(opened, job, out, Means(workers, ray, opening), json)
        return
    refuse("without --out", format=format, shard_size=shard_size, workers=workers, ray=ray)
    array = read_array(noise, "noise") if noise is not None else None
    count = n if n is not None else (len(array) if array is not None and array.ndim else 64)
    if count < 1:
        raise InputError.of("n", count, "1 or more samples")
    classes = parse_labels(labels, drawing.said["first_sample"], count)
    if output is None and save is None:
        output = Path("samples.png")
    for path in (save, output):
        if path is not None:
            check_writable(path)
    flow = Flow.open(default_bundle(bundle), opening)
    if flow.config.classes and classes is None:
        say(f"no labels given: drawing from the null class; --labels 0-{flow.config.classes - 1} deals out all classes")
    latents, _ = check_noise(flow.config, n if array is not None else count, array)
    request = drawing.request(flow.config, count, None if classes is None else tuple(classes.tolist()))
    with step_bar("sampling") as progress:
        samples = flow.draw(request.resolved(flow.config), latents, Watch(progress))
    report = samples.report
    assert report is not None
    written = _write(flow, samples, save, output)
    if json:
        emit(_document(flow, report, len(samples), written))
    else:
        _tell(flow, report, samples, written, opening)
    if report.nonfinite:
        cure = "They stayed so when drawn again: lower the guidance"
        if not request.redraw_nonfinite:
            cure = "Lower the guidance, or pass --redraw-nonfinite to draw just those again"
        say(
            f"tarflow: check failed: {len(report.nonfinite)} of {len(samples)} samples are not finite: "
            f"{_few(report.nonfinite)}. {cure}"
        )
        raise typer.Exit(1)


def _document(flow: Flow, report: Report, n: int, written: dict[str, str]) -> dict[str, Any]:
    found = report.certificate
    return {
        "bundle": str(flow.bundle.folder),
        "bundle_hash": flow.bundle.hash,
        "precision": flow.bundle.manifest.precision,
        "backend": report.backend,
        "n": n,
        "seed": report.seed,
        "first_sample": report.first_sample,
        "files": written,
        "level": report.level,
        "decoding": report.decoding,
        "passes": list(report.passes),
        "certificate": None
        if found is None
        else {"max": float(found.max()), "per_sample": found.tolist(), "seconds": report.certificate_seconds},
        "nonfinite": list(report.nonfinite),
        "redrawn": list(report.redrawn),
        "seconds": report.seconds,
        "denoise_seconds": report.denoise_seconds,
        "peak_memory": report.peak_memory,
    }


def _tell(flow: Flow, report: Report, samples: Samples, written: dict[str, str], opening: Opening) -> None:
    drawn = f"{len(samples)} samples of {flow.bundle.manifest.name}"
    print(f"{drawn} in {report.seconds:.2f} s on {report.backend}: {', '.join(written.values())}")
    if opening.memory is not None:
        limit = f", of {size_text(opening.memory)}" if isinstance(opening.memory, int) else ""
        print(f"memory: {size_text(report.peak_memory)} at peak{limit}")
    if report.certificate is not None:
        worst, seconds = report.certificate.max(), report.certificate_seconds
        print(f"round-trip error {worst:.2g} at most, checked in {seconds:.2f} s")
    if report.decoding != "serial":
        print(f"decoded {report.decoding}: {sum(report.passes)} dependent passes")
    if report.redrawn:
        print(f"redrawn because not finite: samples {_few(report.redrawn)}")
    print(report.level)


def _write(flow: Flow, samples: Samples, save: Path | None, output: Path | None) -> dict[str, str]:
    """Write what was asked for, each file whole or not at all; return what was written."""
    import numpy as np

    from ..runtime.files import replacing
    from ..runtime.image import grid, write_png

    written, report = {}, samples.report
    assert report is not None
    if save is not None:
        with replacing(save) as file:
            np.save(file, np.asarray(samples))
        written["array"] = str(save)
    if output is not None:
        text = {
            "Software": "tarflow",
            "seed": "given noise" if report.seed is None else str(report.seed),
            "sample_indices": f"{report.first_sample}-{report.first_sample + len(samples) - 1}",
            "bundle_hash": flow.bundle.hash,
        }
        write_png(output, grid(samples), text, zoom=max(1, 48 // flow.config.image_size))
        written["picture"] = str(output)
    return written


def _few(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")
