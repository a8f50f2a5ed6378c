"""``tarflow evaluate``: the Frechet distance between a bundle's samples and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import default_bundle, emit, parse_labels, read_images, say, status_line, step_bar
from .options import BundleArgument, Decode, Json, Labels, LowMemory, Provider, Spinning, Threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..quality.features import FeatureNetwork
    from ..quality.frechet import Statistics
    from ..runtime.bundle import Bundle
    from ..runtime.flow import Flow, Progress

DIGITS = Path(__file__).parent.parent / "features" / "digits.onnx"  # the demo's; its statistics lie beside it
_PART = 1024  # samples drawn before their features are taken: memory stays bounded


def evaluate(
    bundle: BundleArgument = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Images: a folder, .npy, or statistics (.npz). Default: the digits, for the demo only."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="The feature network, ONNX. Default: the demo's own, for the demo only.")
    ] = None,
    feature_size: Annotated[int | None, typer.Option(help="Side images are resized to, if the graph is open.")] = None,
    feature_range: Annotated[
        str | None, typer.Option(help="Values the network expects: -1,1 (default), 0,1, 0,255 or imagenet.")
    ] = None,
    feature_output: Annotated[str | None, typer.Option(help="The layer, if the network has several outputs.")] = None,
    n: Annotated[int, typer.Option("--n", help="How many samples are drawn.")] = 10_000,
    samples: Annotated[
        Path | None, typer.Option(help="Evaluate these images (a folder or .npy) instead of drawing.")
    ] = None,
    labels: Labels = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0 is none.")] = 0.0,
    guide: Annotated[str, typer.Option(help="What is guided: ab, a (scale) or b (shift).")] = "ab",
    annealed: Annotated[
        bool, typer.Option("--annealed/--constant", help="Let guidance grow along the sequence.")
    ] = False,
    attention_temperature: Annotated[float, typer.Option(help="Divides the unconditional branch's logits.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the resampling.")] = 0,
    resamples: Annotated[int, typer.Option(help="Resamplings of the bootstrap.")] = 100,
    save_stats: Annotated[Path | None, typer.Option(help="Write the statistics of --against as .npz.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples at a time. Default: up to 64, by memory.")] = None,
    decode: Decode = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    spinning: Spinning = None,
    low_memory: LowMemory = False,
    json: Json = False,
) -> None:
    """Frechet distance between samples and real images, over features of an ONNX network, with its standard error.

    Labels are dealt out over all classes unless given. Images are compared as 8-bit pictures.

    Example: tarflow evaluate tarflow-bundle --against photos/ --features inception.onnx --n 50000
    """
    from ..quality.features import FeatureNetwork
    from ..quality.frechet import estimate, write_statistics
    from ..runtime.bundle import Bundle
    from ..runtime.errors import InputError
    from ..runtime.files import check_writable
    from ..runtime.flow import Flow, Guidance

    if seed < 0:
        raise InputError(f"--seed is {seed}; expected 0 or more")
    if n < 2 or resamples < 2:
        raise InputError(f"--n is {n} and --resamples {resamples}; expected 2 or more of each, thousands of samples")
    guided = Guidance(guidance, guide, annealed, attention_temperature)
    opened = Bundle.open(default_bundle(bundle))
    network = FeatureNetwork.open(
        features or _default_network(opened), feature_output, feature_size, feature_range, threads
    )
    if save_stats is not None:
        check_writable(save_stats)
    with status_line() as line:
        line("features of the images to compare with")
        reference = _reference(against or _default_images(features, opened), network, opened)
    if save_stats is not None:
        write_statistics(save_stats, reference, network.identity)
    if samples is not None:
        found = network(_pictures(samples, opened))
    else:
        flow = Flow.open(opened, provider, threads, spinning, low_memory)
        classes = labels if labels is not None or not flow.config.classes else f"0-{flow.config.classes - 1}"
        how = {"guidance": guided, "seed": seed, "batch_size": batch_size, "decode": decode}
        found = _draw(flow, network, parse_labels(classes, 0, n), n, how)
    with status_line() as line:
        line(f"resampling {resamples} times")
        result = estimate(found, reference, resamples, seed)

    warnings = _warnings(result.count, reference, result.dimension)
    document = {
        "bundle": str(opened.folder),
        "bundle_hash": opened.hash,
        "precision": opened.manifest.precision,
        "samples": str(samples) if samples is not None else "drawn",
        "seed": seed,
        "guidance": asdict(guided) if samples is None else None,
        "network": network.identity,
        "against": str(against) if against is not None else "digits",
        "reference_images": reference.count or None,
        **asdict(result),
        "saved": str(save_stats) if save_stats is not None else None,
        "warnings": warnings,
    }
    if json:
        emit(document)
    else:
        low, high = result.interval
        what = str(samples) if samples is not None else f"samples of {opened.manifest.name}, guidance {guidance:g}"
        print(f"Frechet distance {result.distance:.4g} +- {result.standard_error:.2g} (95 %: {low:.4g} to {high:.4g})")
        print(f"  {result.count} images: {what}")
        print(f"  against {reference.count or 'an unknown number of'} images: {document['against']}")
        print(f"  {result.dimension} features; of the distance, {result.mean_part:.2g} is of means")
        print(f"  about {result.bias:.2g} of it is there because {result.count} images are not infinitely many")
        if save_stats is not None:
            print(f"  statistics: {save_stats}")
    for warning in warnings:
        say(f"tarflow: warning: {warning}")


def _default_network(bundle: Bundle) -> Path:
    """The demo's own network for the demo and exports of it; for any other model InputError."""
    from ..runtime.errors import InputError

    if bundle.manifest.name == "digits" and bundle.manifest.config.image == (1, 8, 8):
        return DIGITS
    raise InputError(
        "which features? Pass --features NETWORK.onnx: Inception for numbers comparable with papers, or any network "
        "that knows such images. Only the demo model has one of its own"
    )


def _default_images(features: Path | None, bundle: Bundle) -> Path:
    from ..runtime.errors import InputError

    if features is None and _default_network(bundle) == DIGITS:
        return DIGITS.with_suffix(".npz")
    raise InputError("against what? Pass --against FOLDER of images, .npy, or statistics saved with --save-stats")


def _reference(against: Path, network: FeatureNetwork, bundle: Bundle) -> Statistics:
    """The statistics of the images to compare with: read, or computed. Raises InputError if they do not fit."""
    from ..quality.frechet import Statistics, read_statistics
    from ..runtime.errors import InputError

    if against.suffix != ".npz":
        return Statistics.of(network(_pictures(against, bundle)))
    statistics, made_with = read_statistics(against)
    if made_with is None:
        say(f"'{against}' does not say which network made it; it must be the one of --features, prepared alike")
    elif made_with != network.identity:
        raise InputError(
            f"'{against}' was made with another network, layer, size or range ({made_with[:12]}...; here "
            f"{network.identity[:12]}...): make it again with --save-stats"
        )
    return statistics


def _pictures(path: Path, bundle: Bundle) -> NDArray[np.uint8]:
    """8-bit images of the model's shape from a folder or .npy; floats are taken to be in [-1, 1] units."""
    from ..runtime.errors import InputError
    from ..runtime.image import to_uint8

    shape = bundle.manifest.config.image
    if path.is_dir():
        return read_images(path, shape[0], shape[1])[0]
    stored = read_images(path, shape[0], shape[1])[0]
    known = stored.dtype.kind == "f" or stored.dtype == "uint8"
    if stored.ndim != 4 or stored.shape[1:] != shape or not len(stored) or not known:
        raise InputError(
            f"'{path}' holds {stored.dtype} of shape {stored.shape}; expected (N, {', '.join(map(str, shape))}), uint8 "
            "or floats in [-1, 1]"
        )
    return stored if stored.dtype.kind == "u" else to_uint8(_finite(stored))


def _draw(
    flow: Flow, network: FeatureNetwork, labels: NDArray[np.int64] | None, n: int, how: dict[str, Any]
) -> NDArray[np.float32]:
    """Features (n, F) of samples 0 ... n - 1, drawn part by part."""
    import numpy as np

    from ..runtime.image import to_uint8

    flow.resolve(n, labels=labels, guidance=how["guidance"], seed=how["seed"])
    rows = []
    with step_bar("sampling") as bar:
        for start in range(0, n, _PART):
            stop = min(start + _PART, n)
            images = flow.sample(
                stop - start,
                labels=None if labels is None else labels[start:stop],
                first_sample=start,
                part_of_more=True,
                progress=_scaled(bar, start / n, (stop - start) / n),
                **how,
            )
            rows.append(network(to_uint8(_finite(images))))
    return np.concatenate(rows)


def _scaled(bar: Callable[[Progress], None] | None, before: float, share: float) -> Callable[[Progress], None] | None:
    """Progress of a part as progress of the whole, in steps of a thousandth."""
    if bar is None:
        return None
    return lambda p: bar(replace(p, done=round(1000 * (before + share * p.done / p.total)), total=1000))


def _finite(images: NDArray[Any]) -> NDArray[Any]:
    """The images, if all are finite; else CheckFailed: a black picture would be judged in a sample's place."""
    import numpy as np

    from ..runtime.errors import CheckFailed

    broken = int((~np.isfinite(images).all((1, 2, 3))).sum())
    if broken:
        raise CheckFailed(f"{broken} of {len(images)} samples are not finite, so they have no features: guide less")
    return images


def _warnings(count: int, reference: Statistics, dimension: int) -> list[str]:
    found = []
    for number, what in ((count, "samples"), (reference.count, "images to compare with")):
        if 0 < number <= dimension:
            found.append(f"{number} {what} are no more than the {dimension} features: the distance is far too large")
    return found
