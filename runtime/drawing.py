"""A request on its way to images: tile by tile decoded, drawn again where it overflowed, certified, denoised."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import noise
from .backend import Array, Branches
from .chain import Chain, OnBlock, Ways
from .image import unpatchify
from .request import Resolved
from .samples import Preview, Progress, Watch

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

    ``latents`` (N, T, D) is noise that was given, None for noise by seed. ``total`` sequential steps are to come.
    """

    def __init__(self, chain: Chain, request: Resolved, ways: Ways, latents: Array | None, watch: Watch) -> None:
        self.chain, self.request, self.ways, self.latents, self.watch = chain, request, ways, latents, watch
        self.images = np.empty((request.n, *chain.config.image), np.float32)
        self.certificate = np.empty(request.n, np.float32) if request.certify else None
        self.classes = request.classes()
        self.passes = np.zeros(chain.config.blocks, np.int64)
        self.redrawn: list[int] = []
        self.certificate_seconds = self.denoise_seconds = 0.0
        self.done = self.total = 0

    def draw(self, tile: Tile) -> None:
        """Compute a tile, and keep what is wanted of it."""
        config, rows = self.chain.config, tile.stop - tile.start
        z = np.zeros((rows, config.tokens, config.patch_dim), np.float32)
        wanted = range(tile.start, tile.stop)[tile.inside]
        z[tile.inside] = self.latents[tile.output] if self.latents is not None else self._noise(wanted)
        classes = np.full(rows, -1, np.int64)
        classes[tile.inside] = self.classes[tile.output]
        branches = self.request.guidance.branches(config.tokens, classes)
        x, passes = self.chain.decode(z, branches, self.ways, self._count, self._previewing(tile))
        self.passes += passes
        if self.request.redraw_nonfinite:
            self._redraw(x, z, branches, tile)
        states: list[Array] | None = None
        if self.certificate is not None:
            started = time.perf_counter()
            states, _ = self.chain.encode(x, branches)
            self.certificate[tile.output] = self.chain.round_trip(states[-1], z)[tile.inside]
            self.certificate_seconds += time.perf_counter() - started
        if self.request.strength is not None:
            started = time.perf_counter()  # an unguided certificate has encoded what the gradient starts from
            x = self.chain.denoise(x, classes, self.request.strength, None if self.request.guidance.scale else states)
            self.denoise_seconds += time.perf_counter() - started
        self.images[tile.output] = unpatchify(x[tile.inside], config.patch_size, config.channels)

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

    def _noise(self, samples: range, stream: int = noise.SAMPLING) -> Array:
        shape = self.chain.config.tokens, self.chain.config.patch_dim
        return noise.normal(self.request.seed, samples, shape, stream)

    def _count(self, block: int, position: int) -> None:
        self.done += 1
        if self.watch.progress is not None:
            self.watch.progress(Progress(self.done, self.total, block, position))

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
