"""A request on its way to images: tile by tile decoded, drawn again where it overflowed, certified, denoised."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import noise
from .backend import Array, Branches
from .chain import Chain, OnBlock, Ways
from .image import unpatchify
from .memory import peak
from .request import Resolved
from .samples import CertifiedReport, CertifiedSamples, Preview, Progress, Report, Samples, Stage, Watch, nonfinite

REDRAWS = 8  # attempts at a sample that is not finite


class Tile(NamedTuple):
    """Sample indices ``start ... stop - 1`` computed together; those ``inside`` (rows of the tile) are wanted, and are
    the rows ``output`` of the result.
    """

    start: int
    stop: int
    inside: slice
    output: slice


def tiles(first: int, count: int, size: int, aligned: bool) -> Iterator[Tile]:
    """Tiles that cover ``first ... first + count - 1``; aligned ones are whole, and begin at multiples of ``size``."""
    start, end = (first // size * size if aligned else first), first + count
    while start < end:
        stop = start + size if aligned else min(start + size, end)
        inside = slice(max(start, first) - start, min(stop, end) - start)
        yield Tile(start, stop, inside, slice(start + inside.start - first, start + inside.stop - first))
        start += size


class Drawing:
    """One request, drawn in ``ways``: :meth:`draw` a tile at a time, then read ``images`` and what was found out.

    ``latents`` (N, T, D) is noise that was given, None for noise by seed. ``total`` sequential steps are to come,
    and ``stages`` passes of batches that are certified or denoised.
    """

    def __init__(self, chain: Chain, request: Resolved, ways: Ways, latents: Array | None, watch: Watch) -> None:
        self.chain, self.request, self.ways, self.latents, self.watch = chain, request, ways, latents, watch
        self.images = np.empty((request.n, *chain.config.image), np.float32)
        self.certificate = np.empty(request.n, np.float32) if request.certify else None
        self.log_prob = np.empty(request.n, np.float64) if request.certify else None
        self.classes = request.classes()
        self.passes = np.zeros(chain.config.blocks, np.int64)
        self.redrawn: list[int] = []
        self.certificate_seconds = self.denoise_seconds = 0.0
        self.done = self.total = 0
        self.staged = self.stages = 0
        self._following: Tile | None = None
        self._ahead: tuple[Tile, Array] | None = None  # and its noise

    def expect(self, tiles: int) -> None:
        """So many tiles are to come."""
        self.total = tiles * self.chain.config.blocks * (self.chain.config.tokens - 1)
        self.stages = tiles * (self.request.certify + (self.request.strength is not None))

    def draw(self, tile: Tile, following: Tile | None = None) -> None:
        """Compute a tile, and keep what is wanted of it. The noise of the ``following`` one is made on the way, once
        all steps have begun: a GPU is busy with them for a while.
        """
        self._following = following
        config, rows = self.chain.config, tile.stop - tile.start
        z = np.zeros((rows, config.tokens, config.patch_dim), np.float32)
        ahead, self._ahead = self._ahead, None
        z[tile.inside] = ahead[1] if ahead is not None and ahead[0] == tile else self._latents(tile)
        classes = np.full(rows, -1, np.int64)
        classes[tile.inside] = self.classes[tile.output]
        branches = self.request.guidance.branches(config.tokens, classes)
        x, passes = self.chain.decode(z, branches, self.ways, self._count, self._previewing(tile))
        self.passes += passes
        if self.request.redraw_nonfinite:
            self._redraw(x, z, branches, tile)
        states: list[Array] | None = None
        if self.certificate is not None and self.log_prob is not None:
            started = time.perf_counter()
            self._stage("certify", 0)
            states, log_det = self.chain.encode(x, branches)
            self.certificate[tile.output] = self.chain.round_trip(states[-1], z)[tile.inside]
            self.log_prob[tile.output] = self.chain.log_prob(states[-1], log_det)[tile.inside]
            self.certificate_seconds += time.perf_counter() - started
            self._stage("certify", 1)
        if self.request.strength is not None:
            started = time.perf_counter()  # an unguided certificate has encoded what the gradient starts from
            self._stage("denoise", 0)
            x = self.chain.denoise(x, classes, self.request.strength, None if self.request.guidance.scale else states)
            self.denoise_seconds += time.perf_counter() - started
            self._stage("denoise", 1)
        self.images[tile.output] = unpatchify(x[tile.inside], config.patch_size, config.channels)

    def samples(self, precision: str, seconds: float, suspect_above: float) -> Samples:
        """What was drawn in so many seconds, by graphs of this precision, with its report."""
        request, backend = self.request, self.chain.backend
        found: dict[str, Any] = {
            "seed": None if self.latents is not None else request.seed,
            "samples": range(request.first_sample, request.first_sample + request.n),
            "level": self._level(precision),
            "backend": backend.description,
            "decoding": self.ways.words,
            "density": self._density(precision) if request.certify else None,
            "passes": tuple(self.passes.tolist()),
            "nonfinite": tuple(row + request.first_sample for row in nonfinite(self.images)),
            "redrawn": tuple(self.redrawn),
            "certificate": self.certificate,
            "log_prob": self.log_prob,
            "seconds": seconds,
            "certificate_seconds": self.certificate_seconds,
            "denoise_seconds": self.denoise_seconds,
            "peak_memory": peak(),
            "suspect_above": suspect_above,
        }
        if request.certify:
            return self.images.view(CertifiedSamples).with_report(CertifiedReport(**found))
        return self.images.view(Samples).with_report(Report(**found))

    def _level(self, precision: str) -> str:
        if self.request.reproducible:
            return "L1: bitwise the same for any n, batch size and thread count, on this machine and engine"
        if self.chain.backend.portable and not self.ways.tolerance:
            return "L1: bitwise the same for any n, batch size, thread count and processor, before denoising"
        agreement = "1e-5" if precision == "fp32" else f"{precision} rounding"
        if self.ways.tolerance > 1e-5:
            agreement = f"the tolerance of {self.ways.tolerance:g} they are solved to, a few times over"
        return f"L2: noise the same anywhere to the bit; samples agree across batch sizes to {agreement}"

    def _density(self, precision: str) -> str:
        """What ``log_prob`` is the density of, and what keeps the samples from being drawn from just that."""
        of = f"of the raw sample, exact under the bundle's {precision} graphs"
        if self.request.guidance.scale:
            of += ", guided"
        decoded = self.chain.backend.precision
        inexact = [f"in {decoded}"] if decoded != "fp32" else []
        if self.ways.tolerance:
            inexact.append(f"in parallel to {self.ways.tolerance:g}")
        if inexact:
            of += f"; decoded {' and '.join(inexact)}: drawn from that density as nearly as the certificate says"
        return of

    def _redraw(self, x: Array, z: Array, branches: Branches, tile: Tile) -> None:
        """Replace, in place, what is not finite by later attempts of the same sample; the tile keeps its shape."""
        redrawn: set[int] = set()
        for attempt in range(1, REDRAWS + 1):
            broken = [row for row in range(len(x))[tile.inside] if not np.isfinite(x[row]).all()]
            if not broken:
                break
            for row in broken:
                z[row] = self._noise(range(tile.start + row, tile.start + row + 1), stream=attempt)[0]
            x[broken] = self.chain.decode(z, branches, self.ways, lambda block, position: None)[0][broken]
            redrawn |= {tile.start + row for row in broken}
        self.redrawn += sorted(redrawn)

    def _latents(self, tile: Tile) -> Array:
        """Noise of what is wanted of a tile."""
        wanted = range(tile.start, tile.stop)[tile.inside]
        return self.latents[tile.output] if self.latents is not None else self._noise(wanted)

    def _noise(self, samples: range, stream: int = noise.SAMPLING) -> Array:
        shape = self.chain.config.tokens, self.chain.config.patch_dim
        return noise.normal(self.request.seed, samples, shape, stream)

    def _count(self, block: int, position: int) -> None:
        self.done += 1
        if self.watch.progress is not None:
            self.watch.progress(Progress(self.done, self.total, block, position))
        if self._following is not None and block == 0 and position == self.chain.config.tokens - 2:
            self._ahead = self._following, self._latents(self._following)

    def _stage(self, name: str, done: int) -> None:
        """A batch begins to be certified or denoised, or is (1)."""
        self.staged += done
        if self.watch.stage is not None:
            self.watch.stage(Stage(name, self.staged, self.stages))

    def _previewing(self, tile: Tile) -> OnBlock | None:
        """Shows the wanted rows of a tile to whoever asked for it."""
        preview, config = self.watch.preview, self.chain.config
        if preview is None:
            return None
        first = self.request.first_sample + tile.output.start

        def show(block: int, x: Array, seconds: float) -> None:
            images = unpatchify(x[tile.inside], config.patch_size, config.channels)
            preview(Preview(block, first, images, seconds))

        return show
