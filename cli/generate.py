"""``tarflow generate``: draw samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.files import size_text
from .console import default_bundle, emit, parse_labels, read_array, say, step_bar
from .options import (
    BundleArgument,
    CudaGraph,
    Decode,
    Json,
    Labels,
    LowMemory,
    Memory,
    Provider,
    Ray,
    Spinning,
    Threads,
    Tolerance,
)

if TYPE_CHECKING:
    from ..runtime.flow import Flow, Samples


def generate(
    bundle: BundleArgument = None,
    n: Annotated[
        int | None, typer.Option("--n", help="How many samples. Default: 64, or as many as --noise has.")
    ] = None,
    labels: Labels = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0 is none.")] = 0.0,
    guide: Annotated[str, typer.Option(help="What is guided: ab, a (scale) or b (shift).")] = "ab",
    annealed: Annotated[
        bool, typer.Option("--annealed/--constant", help="Let guidance grow along the sequence.")
    ] = False,
    attention_temperature: Annotated[float, typer.Option(help="Divides the unconditional branch's logits.")] = 1.0,
    denoise: Annotated[
        bool | None, typer.Option("--denoise/--no-denoise", help="Denoise. Default: if trained with Gaussian noise.")
    ] = None,
    denoise_strength: Annotated[float, typer.Option(help="Factor on the noise variance when denoising.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    first_sample: Annotated[int, typer.Option(help="Index of the first sample; seed and index fix a sample.")] = 0,
    noise: Annotated[Path | None, typer.Option(help="Noise (N, T, D) as .npy, instead of a seed.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write float32 (N, C, H, W), unclipped, as .npy.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Picture of all samples. Default: samples.png, unless --save.")
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify/--no-certify", help="Encode the samples again and report the error.")
    ] = True,
    redraw_nonfinite: Annotated[
        bool, typer.Option("--redraw-nonfinite", help="Draw samples that overflow again.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Samples at a time. Default: up to 64, by memory.")] = None,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="Bitwise the same whatever n, batch size, threads.")
    ] = False,
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
    decode: Decode = None,
    tolerance: Tolerance = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    spinning: Spinning = None,
    low_memory: LowMemory = False,
    memory: Memory = None,
    cuda_graph: CudaGraph = True,
    json: Json = False,
) -> None:
    """Draw samples from a bundle: noise, inverted block by block, denoised, as a picture or an array.

    Example: tarflow generate --n 64 --labels 0-9 --guidance 1 -o digits.png

    Many, in shards that are never drawn twice: tarflow generate --n 50000 --labels 0-9 --out digits --workers 2
    """
    from ..runtime.bundle import Bundle
    from ..runtime.errors import InputError
    from ..runtime.files import check_writable
    from ..runtime.flow import Flow, Guidance
    from ..runtime.memory import parse_memory
    from ..shards.job import DEFAULT_SHARD, Job
    from .shards import Means, draw_shards, refuse, turns

    guided = Guidance(guidance, guide, annealed, attention_temperature)
    if out is not None:
        refuse("with --out", noise=noise, save=save, output=output, batch_size=batch_size, memory=memory)
        opened = Bundle.open(default_bundle(bundle))
        job = Job(
            bundle=opened.hash,
            n=n if n is not None else 64,
            first_sample=first_sample,
            seed=seed,
            labels=turns(labels, first_sample, n if n is not None else 64),
            guidance=guided,
            denoise=denoise_strength if denoise or (denoise is None and opened.manifest.config.noise_std) else None,
            certify=certify,
            redraw_nonfinite=redraw_nonfinite,
            decode=decode,
            tolerance=tolerance,
            format=format or "npy",
            shard_size=shard_size if shard_size is not None else DEFAULT_SHARD,
        )
        draw_shards(opened, job, out, Means(workers, ray, provider, threads, spinning, low_memory, cuda_graph), json)
        return
    refuse("without --out", format=format, shard_size=shard_size, workers=workers, ray=ray)
    array = read_array(noise, "noise") if noise is not None else None
    count = n if n is not None else (len(array) if array is not None and array.ndim else 64)
    if count < 1:
        raise InputError(f"--n is {count}; expected 1 or more samples")
    classes = parse_labels(labels, first_sample, count)
    if output is None and save is None:
        output = Path("samples.png")
    for path in (save, output):
        if path is not None:
            check_writable(path)
    flow = Flow.open(default_bundle(bundle), provider, threads, spinning, low_memory, parse_memory(memory), cuda_graph)
    if flow.config.classes and classes is None:
        say(f"no labels given: drawing from the null class; --labels 0-{flow.config.classes - 1} deals out all classes")
    with step_bar("sampling") as progress:
        samples = flow.sample(
            n if array is not None else count,
            noise=array,
            labels=classes,
            guidance=guided,
            seed=seed,
            first_sample=first_sample,
            denoise=denoise_strength if denoise or (denoise is None and flow.config.noise_std) else False,
            certify=certify,
            batch_size=batch_size,
            reproducible=reproducible,
            redraw_nonfinite=redraw_nonfinite,
            decode=decode,
            tolerance=tolerance,
            progress=progress,
        )
    written = _write(flow, samples, save, output, seed if array is None else None, first_sample)
    report = samples.report
    assert report is not None
    if json:
        found = report.certificate
        emit(
            {
                "bundle": str(flow.bundle.folder),
                "bundle_hash": flow.bundle.hash,
                "precision": flow.bundle.manifest.precision,
                "backend": report.backend,
                "n": len(samples),
                "seed": report.seed,
                "first_sample": first_sample,
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
        )
    else:
        drawn = f"{len(samples)} samples of {flow.bundle.manifest.name}"
        print(f"{drawn} in {report.seconds:.2f} s on {report.backend}: {', '.join(written.values())}")
        if memory is not None:
            print(f"memory: {size_text(report.peak_memory)} at peak, of {memory}")
        if report.certificate is not None:
            print(
                f"round-trip error {report.certificate.max():.2g} at most, checked in "
                f"{report.certificate_seconds:.2f} s"
            )
        if report.decoding != "serial":
            print(f"decoded {report.decoding}: {sum(report.passes)} dependent passes")
        if report.redrawn:
            print(f"redrawn because not finite: samples {_few(report.redrawn)}")
        print(report.level)
    if report.nonfinite:
        say(
            f"tarflow: check failed: {len(report.nonfinite)} of {len(samples)} samples are not finite: "
            f"{_few(report.nonfinite)}. "
            + (
                "They stayed so when drawn again: lower the guidance"
                if redraw_nonfinite
                else "Lower the guidance, or pass --redraw-nonfinite to draw just those again"
            )
        )
        raise typer.Exit(1)


def _write(
    flow: Flow, samples: Samples, save: Path | None, output: Path | None, seed: int | None, first: int
) -> dict[str, str]:
    """Write what was asked for, each file whole or not at all; return what was written."""
    import numpy as np

    from ..runtime.files import replacing
    from ..runtime.image import grid, write_png

    written = {}
    if save is not None:
        with replacing(save) as file:
            np.save(file, np.asarray(samples))
        written["array"] = str(save)
    if output is not None:
        text = {
            "Software": "tarflow",
            "seed": "given noise" if seed is None else str(seed),
            "sample_indices": f"{first}-{first + len(samples) - 1}",
            "bundle_hash": flow.bundle.hash,
        }
        write_png(output, grid(samples), text, zoom=max(1, 48 // flow.config.image_size))
        written["picture"] = str(output)
    return written


def _few(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")
