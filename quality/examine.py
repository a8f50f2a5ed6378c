"""What a bundle's samples are like: drawn, certified, timed and encoded again, and images of the user's beside them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Array
from ..runtime.bundle import Bundle
from ..runtime.errors import CheckFailed
from ..runtime.flow import Flow
from ..runtime.image import unpatchify
from ..runtime.inputs import AS_THEY_ARE
from ..runtime.request import Resolved
from ..runtime.samples import Preview, Report, Watch, nonfinite

SHOWN = 10  # samples followed from block to block


@dataclass(frozen=True, slots=True)
class Population:
    """Images as the flow sees them: ``latent`` (N, T, D) and ``bits`` (N,) per dimension."""

    name: str
    latent: Array
    bits: Array


@dataclass(frozen=True, slots=True)
class Examination:
    """What :func:`examine` found. All N samples of ``request`` are in ``images`` (N, channels, size, size); those that
    are not finite are listed in ``nonfinite`` and in none of the statistics. ``report`` says how they were drawn.

    ``stages`` are the first few samples as (name, images): the noise, after each block, denoised. ``block_seconds``
    are of decoding all samples, by block in encoding order. Times in seconds.
    """

    bundle: Bundle
    request: Resolved
    report: Report
    images: Array
    stages: tuple[tuple[str, Array], ...]
    nonfinite: tuple[int, ...]
    certificate: Array
    block_seconds: tuple[float, ...]
    encode_seconds: float
    denoise_seconds: float
    populations: tuple[Population, ...]


def examine(flow: Flow, request: Resolved, data: tuple[Array, NDArray[np.int64] | None] | None = None) -> Examination:
    """Draw what is asked for, and look at it and at ``data``: images in [-1, 1] units, with the training noise in them,
    and their labels.

    Raises CheckFailed if no sample is finite or none can be encoded, InputError as :meth:`Flow.encode` does.
    """
    first, labels, guidance = request.first_sample, request.classes(), request.guidance
    flow.draw(replace(request.part(first, 1), certify=True))  # opens the graphs
    seen = _Seen(flow.config.blocks, first)
    drawn = flow.draw(replace(request, denoise=False, certify=True), watch=Watch(preview=seen.add))
    assert drawn.report.certificate is not None
    raw = np.asarray(drawn)
    finite = np.flatnonzero(np.isfinite(raw).all((1, 2, 3)))
    if not len(finite):
        raise CheckFailed(f"none of {request.n} samples is finite: lower the guidance, which is {guidance.scale:g}")

    started = time.perf_counter()
    populations = [_population(flow, "samples", raw[finite], labels[finite])]
    encode_seconds = time.perf_counter() - started
    if data is not None:
        populations.append(_population(flow, "data", *data))

    images, started = raw.copy(), time.perf_counter()
    if flow.config.noise_std:
        images[finite] = flow.denoise(raw[finite], labels[finite], range=AS_THEY_ARE)
    denoise_seconds = time.perf_counter() - started if flow.config.noise_std else 0.0
    z = flow.noise(request.seed, range(first, first + min(SHOWN, request.n))) * flow.deviation
    stages = [("noise", unpatchify(z, flow.config.patch_size, flow.config.channels)), *seen.stages()]
    return Examination(
        bundle=flow.bundle,
        request=request,
        report=drawn.report,
        images=images,
        stages=(*stages, ("denoised", images[:SHOWN])) if flow.config.noise_std else tuple(stages),
        nonfinite=nonfinite(images),
        certificate=np.nan_to_num(drawn.report.certificate[finite], nan=np.inf),
        block_seconds=tuple(seen.seconds),
        encode_seconds=encode_seconds,
        denoise_seconds=denoise_seconds,
        populations=tuple(populations),
    )


class _Seen:
    """Adds up the time of each block, and keeps what the first samples look like after it."""

    def __init__(self, blocks: int, first: int) -> None:
        self.first, self.seconds = first, [0.0] * blocks
        self.images: dict[int, list[Array]] = {block: [] for block in reversed(range(blocks))}

    def add(self, now: Preview) -> None:
        self.seconds[now.block] += now.seconds
        if now.first < self.first + SHOWN:
            self.images[now.block].append(now.images[: self.first + SHOWN - now.first].copy())

    def stages(self) -> list[tuple[str, Array]]:
        return [(f"block {block}", np.concatenate(images)) for block, images in self.images.items()]


def _population(flow: Flow, name: str, images: Array, labels: NDArray[np.int64] | None) -> Population:
    latent, log_det = flow.encode(images, labels, AS_THEY_ARE)
    bits = flow.bits_of(latent, log_det)
    sound = np.isfinite(bits) & np.isfinite(latent).all((1, 2))
    if not sound.any():
        raise CheckFailed(f"none of {len(images)} images ({name}) can be encoded: all overflow; guide less")
    return Population(name, latent[sound], bits[sound])
