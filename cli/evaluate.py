"""``tarflow evaluate``: the Frechet distance between a bundle's samples and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..runtime.bundle import Bundle
from ..runtime.errors import CheckFailed, InputError
from ..runtime.files import check_writable
from ..runtime.opening import Opening
from .console import emit, few, identity, say
from .images import Range, read_images
from .options import GUIDANCE, BundleArgument, Drawing, Json, Labels, Quiet, draws, opens
from .progress import share_bar, step_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..quality.features import FeatureNetwork
    from ..quality.frechet import Statistics
    from ..runtime.flow import Flow
    from ..runtime.request import Resolved

DIGITS = Path(__file__).parent.parent / "features" / "digits.onnx"  # the demo's; its statistics lie beside it
_PART = 1024  # samples drawn before their features are taken: memory stays bounded


@opens
@draws(*GUIDANCE, "seed", "batch_size", "decode")
def evaluate(
    bundle: BundleArgument,
    against: Annotated[
        Path | None, Option(help="Images: a folder, .npy, or statistics (.npz). Default: digits, for the demo only.")
    ] = None,
    features: Annotated[Path | None, Option(help="ONNX feature network. Default: the demo's, for the demo.")] = None,
    feature_size: Annotated[int | None, Option(help="Side images are resized to, if the graph is open.")] = None,
    feature_range: Annotated[str | None, Option(help="Values expected: -1,1 (default), 0,1, 0,255, imagenet.")] = None,
    feature_output: Annotated[str | None, Option(help="The layer, if the network has several outputs.")] = None,
    n: Annotated[int, Option("--n", help="How many samples are drawn.")] = 10_000,
    samples: Annotated[Path | None, Option(help="Evaluate these: of generate --out or --save, or a folder.")] = None,
    range: Range = None,
    labels: Labels = None,
    *,
    drawing: Drawing,
    resamples: Annotated[int, Option(help="Resamplings of the bootstrap, by the same seed.")] = 100,
    save_stats: Annotated[Path | None, Option(help="Write the statistics of --against as .npz.")] = None,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Frechet distance between samples and real images, over features of an ONNX network, with its standard error.

    Labels are dealt out over all classes unless given. Images are compared as 8-bit pictures.

    Example: tarflow evaluate tarflow-bundle --against photos/ --features inception.onnx --n 50000
    """
    from ..quality.features import FeatureNetwork, Usage
    from ..quality.frechet import estimate, write_statistics
    from ..runtime.flow import Flow
    from ..runtime.image import check_suffix

    seed = drawing.said["seed"]
    if seed < 0:  # which a request would refuse, but the bootstrap takes it too
        raise InputError.of("seed", seed, "0 or more")
    if n < 2 or resamples < 2:
        raise InputError(f"--n is {n} and --resamples {resamples}; expected 2 or more of each, thousands of samples")
    shape = bundle.manifest.config
    request = drawing.request(shape, n, labels, every_class=True) if samples is None else None
    usage = Usage(feature_output, feature_size, feature_range)
    network = FeatureNetwork.open(features or _own_network(bundle), usage, opening.threads)
    if features is not None and against is None:
        raise InputError("against what? Pass --against FOLDER of images, .npy, or statistics saved with --save-stats")
    if save_stats is not None:
        check_suffix(save_stats, (".npz",), "save_stats")
        check_writable(save_stats)
    with share_bar("features of the images to compare with", quiet) as tell:
        reference = _reference(against or DIGITS.with_suffix(".npz"), network, bundle, range, tell)
    if save_stats is not None:
        write_statistics(save_stats, reference, network.identity)
    if request is None:
        assert samples is not None
        with share_bar("features of the samples", quiet) as tell:
            found = network(_pictures(samples, bundle, range), tell)
    else:
        found = _draw(Flow.open(bundle, opening), network, request, quiet)
    with share_bar(f"resampling {resamples} times", quiet) as tell:
        result = estimate(found, reference, resamples, seed, tell)

    warnings = [
        f"{count} {what} are no more than the {result.dimension} features: the distance is far too large"
        for count, what in ((result.count, "samples"), (reference.count, "images to compare with"))
        if 0 < count <= result.dimension
    ]
    if json:
        drawn = {"samples": samples or "drawn", "seed": seed, "guidance": asdict(request.guidance) if request else None}
        to = {"network": network.identity, "against": against or "digits", "reference_images": reference.count or None}
        about = {**identity(bundle), "precision": bundle.manifest.precision, **drawn, **to}
        emit(**about, **asdict(result), saved=save_stats, warnings=warnings)
    else:
        what = f"samples of {bundle.manifest.name}, guidance {request.guidance.scale:g}" if request else str(samples)
        print(f"Frechet distance {result.distance:.4g} +- {result.standard_error:.2g}", end=" ")
        print(f"(95 %: {result.interval[0]:.4g} to {result.interval[1]:.4g})")
        print(f"  {result.count} images: {what}")
        print(f"  against {reference.count or 'an unknown number of'} images: {against or 'digits'}")
        print(f"  {result.dimension} features; of the distance, {result.mean_part:.2g} is of means")
        print(f"  about {result.bias:.2g} of it is there because {result.count} images are not infinitely many")
        if save_stats is not None:
            print(f"  statistics: {save_stats}")
    for warning in warnings:
        say(f"tarflow: warning: {warning}")


def _own_network(bundle: Bundle) -> Path:
    """The demo's own network for the demo and exports of it; for any other model InputError."""
    if bundle.manifest.name != "digits" or bundle.manifest.config.image != (1, 8, 8):
        raise InputError(
            "which features? Pass --features NETWORK.onnx: Inception for numbers comparable with papers, or any "
            "network that knows such images. Only the demo model has one of its own"
        )
    return DIGITS


def _reference(
    against: Path, network: FeatureNetwork, bundle: Bundle, range: str | None, tell: Callable[..., None]
) -> Statistics:
    """The statistics of the images to compare with: read, or computed. Raises InputError if they do not fit."""
    from ..quality.frechet import Statistics, read_statistics

    if against.suffix != ".npz":
        return Statistics.of(network(_pictures(against, bundle, range), tell))
    statistics, made_with = read_statistics(against)
    if made_with is None:
        say(f"'{against}' does not say which network made it; it must be the one of --features, prepared alike")
    elif made_with != network.identity:
        raise InputError(
            f"'{against}' was made with another network, layer, size or range ({made_with[:12]}...; here "
            f"{network.identity[:12]}...): make it again with --save-stats"
        )
    return statistics


def _pictures(path: Path, bundle: Bundle, range: str | None) -> NDArray[np.uint8]:
    """8-bit images of the model's shape, from whatever holds such; floats are taken to be in [-1, 1] units."""
    import numpy as np

    from ..shards.contents import is_drawn, read_shards

    if is_drawn(path):  # a shard at a time: floats are four times as large
        parts = read_shards(path, bundle.manifest.config.image)
        return np.concatenate([part if part.dtype.kind == "u" else _as_bytes(part) for part in parts])
    stored = read_images(path, bundle.manifest.config, range).pixels
    return stored if stored.dtype.kind == "u" else _as_bytes(stored)


def _draw(flow: Flow, network: FeatureNetwork, request: Resolved, quiet: bool = False) -> NDArray[np.float32]:
    """Features (n, F) of the samples of a request, drawn part by part."""
    import numpy as np

    from ..runtime.samples import Watch

    vectors, end = [], request.first_sample + request.n
    with step_bar("sampling", request.certify or request.strength is not None, quiet) as steps:
        for start in range(request.first_sample, end, _PART):
            part = request.part(start, min(_PART, end - start))
            mine = steps.within((start - request.first_sample) / request.n, part.n / request.n)
            vectors.append(network(_as_bytes(flow.draw(part, watch=Watch(mine.step, stage=mine.stage)))))
    return np.concatenate(vectors)


def _as_bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    """8-bit images, if all are finite; else CheckFailed: a black picture would be judged in a sample's place."""
    from ..runtime.image import to_uint8
    from ..runtime.samples import nonfinite

    if broken := nonfinite(images):
        found = f"{len(broken)} of {len(images)} samples are not finite"
        raise CheckFailed(f"{found}, so they have no features: {few(broken)}. Guide less")
    return to_uint8(images)
