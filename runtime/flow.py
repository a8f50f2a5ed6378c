"""Flow: an opened bundle that draws samples, encodes images, and says how far each result can be trusted.

    from tarflow.runtime.flow import Flow, Guidance

    flow = Flow.open("tarflow-bundle")
    images = flow.sample(64, labels=np.arange(64) % 10, guidance=Guidance(1.0), certify=True)
    images.report.certificate.max()

Shapes: N images, T patches in a sequence, D numbers in a patch. Images are (N, channels, size, size) float32 in
[-1, 1] units, unclipped. Everything is numpy; a Flow may be used from several threads.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import noise as noise_source
from .backend import Array, Backend, Branches, open_backend
from .bundle import Bundle, ModelShape
from .decode import Parallel, solve, tolerance_of
from .errors import InputError
from .guidance import Guidance as Guidance
from .image import unpatchify
from .inputs import check_images, check_labels, check_noise, check_strength
from .lanes import Lanes
from .memory import USUAL, Budget, cache_row, peak, spend
from .plan import Plan, find_plan

REPRODUCIBLE_TILE = 16  # rows: small enough for one request, large enough to fill a core
REDRAWS = 8  # attempts at a sample that is not finite
_LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: ``done`` of ``total`` sequential steps, now in ``block`` at ``position``."""

    done: int
    total: int
    block: int
    position: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What some samples look like after ``block``, which took ``seconds``: ``images`` (N, channels, size, size), from
    sample ``first`` on.
    """

    block: int
    first: int
    images: Array
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """How a batch of samples was drawn, and what was checked.

    ``certificate`` (N,) is the largest round-trip error of each sample: the raw sample, before denoising, encoded
    again by the parallel graphs, against the noise it came from; None if not asked for. ``nonfinite`` lists the
    sample indices that overflowed and still are not finite, ``redrawn`` those drawn again. ``decoding`` says how blocks
    were solved, ``passes`` counts each block's dependent passes, in block order. Times in seconds; ``peak_memory`` is
    the most bytes the process has held so far.
    """

    seed: int | None
    first_sample: int
    level: str
    backend: str
    decoding: str
    passes: tuple[int, ...]
    nonfinite: tuple[int, ...]
    redrawn: tuple[int, ...]
    certificate: Array | None
    seconds: float
    certificate_seconds: float
    denoise_seconds: float
    peak_memory: int


class Samples(np.ndarray[Any, np.dtype[np.float32]]):
    """Images (N, channels, size, size) that remember in ``report`` how they were drawn; what is derived does not."""

    report: Report | None

    def __array_finalize__(self, parent: object) -> None:
        self.report = None


class Flow:
    """A bundle, open on one provider. Create it with :meth:`open`. ``plan`` is what was calibrated for this machine."""

    def __init__(
        self, bundle: Bundle, backend: Backend, prior_variance: Array | None = None, budget: Budget = USUAL
    ) -> None:
        self.bundle, self.backend, self.budget = bundle, backend, budget
        self.plan: Plan | None = find_plan(bundle, backend.machine)
        self.deviation = np.sqrt(bundle.prior_variance() if prior_variance is None else prior_variance)  # (T, D)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str = "cpu",
        threads: int | None = None,
        spinning: bool | None = None,
        low_memory: bool = False,
        memory: int | None = None,
        cuda_graph: bool = True,
    ) -> Flow:
        """Open a bundle, after checking the hashes of its graphs and weights.

        ``provider`` is "cpu", "cuda", "tensorrt" or "auto". ``threads`` (None: one a core) and ``spinning`` (False
        where cores are shared) go to ONNX Runtime. ``low_memory`` keeps only one block's graphs in memory.
        ``memory`` is a limit in bytes on the process, beside the samples themselves: it chooses batches, sub-batches of
        the gradient, and ``low_memory`` where all blocks do not fit. ``cuda_graph`` False launches every kernel of a
        step on a GPU anew, instead of replaying the step as one CUDA graph. Raises BundleError for a damaged bundle or
        one without engines that fit, MachineError if the provider is not to be had, InputError for an unknown one, and
        for a limit one image exceeds.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        opened.check_runnable()
        budget = spend(opened, memory, low_memory)
        return cls(opened, open_backend(provider, opened, threads, spinning, budget, cuda_graph), budget=budget)

    @property
    def config(self) -> ModelShape:
        return self.bundle.manifest.config

    def sample(
        self,
        n: int | None = None,
        *,
        noise: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        first_sample: int = 0,
        denoise: bool | float | None = None,
        certify: bool = False,
        batch_size: int | None = None,
        reproducible: bool = False,
        redraw_nonfinite: bool = False,
        decode: str | None = None,
        tolerance: float | None = None,
        part_of_more: bool = False,
        progress: Callable[[Progress], None] | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> Samples:
        """Draw samples ``first_sample ... first_sample + n - 1`` of ``seed``, or invert ``noise`` (N, T, D).

        ``labels`` is one class for all or (N,); a label below 0, or None, is the null class. ``denoise`` None means
        wherever the model has Gaussian noise to remove; a number is a strength, the factor on sigma^2.
        ``reproducible`` computes in aligned tiles of 16 rows, so that a sample is bitwise the same whatever n, batch
        size and thread count on one machine. ``decode`` is "serial", "exact" (in parallel, until a patch changes by no
        more than 1e-5) or "fast" (1e-3); ``tolerance`` is another limit. None means exact by the plan of
        ``tarflow calibrate``, or serial where there is none. ``part_of_more`` says that guidance need not do anything
        for these very samples: :meth:`resolve` has seen all. ``progress`` is told each finished position,
        ``preview`` is shown each batch after each block, blocks last to first; an exception of either cancels.
        Returns :class:`Samples`; raises InputError for inputs that cannot be what was meant.
        """
        latents, count = check_noise(self.config, n, noise, seed, first_sample)
        images = np.empty((count, *self.config.image), np.float32)  # first: too many fail here, at once
        classes = check_labels(self.config, labels, count)
        guidance = guidance or Guidance()
        if not part_of_more:
            guidance.check(self.config, classes)
        if redraw_nonfinite and latents is not None:
            raise InputError("samples of given noise cannot be redrawn: drop redraw_nonfinite, or draw by seed")
        strength = check_strength(self.config, denoise)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch size is {batch_size}; expected 1 or more")
        tile = REPRODUCIBLE_TILE if reproducible else (batch_size or self._default_batch(guidance))
        largest = self.backend.largest_batch
        if largest is not None and tile > largest:
            raise InputError(
                f"batches of {tile} images are more than these engines take, which is {largest}: use a smaller "
                f"batch size, or build others: tarflow build '{self.bundle.folder}' --batch 1,{tile},{tile}"
            )
        decoding, ways, lanes = self._ways(
            decode, tolerance, min(tile, count), 2 if guidance.scale else 1, reproducible
        )
        tiles = list(_tiles(first_sample, count, tile, aligned=reproducible))
        counter = _Counter(progress, len(tiles) * self.config.blocks * (self.config.tokens - 1))

        started = time.perf_counter()
        certificate = np.empty(count, np.float32) if certify else None
        redrawn: list[int] = []
        certificate_seconds = denoise_seconds = 0.0
        for start, stop in tiles:
            inside = slice(max(start, first_sample) - start, min(stop, first_sample + count) - start)
            output = slice(start + inside.start - first_sample, start + inside.stop - first_sample)
            z = np.zeros((stop - start, self.config.tokens, self.config.patch_dim), np.float32)
            z[inside] = latents[output] if latents is not None else self.noise(seed, range(start, stop)[inside])
            tile_classes = np.full(stop - start, -1, np.int64)
            tile_classes[inside] = classes[output]
            branches = guidance.branches(self.config.tokens, tile_classes)
            watch = None if preview is None else self._watch(preview, first_sample + output.start, inside)

            x = self._decode(z, branches, ways, counter, lanes, watch)
            if redraw_nonfinite:
                redrawn += self._redraw(x, z, branches, ways, lanes, range(start, stop), inside, seed)
            states: list[Array] | None = None
            if certificate is not None:
                clock = time.perf_counter()
                states, _ = self._encode(x, branches)
                certificate[output] = self._round_trip(states[-1], z)[inside]
                certificate_seconds += time.perf_counter() - clock
            if strength is not None:
                clock = time.perf_counter()  # an unguided certificate has encoded what the gradient starts from
                x = self._denoise(x, tile_classes, strength, None if guidance.scale else states)
                denoise_seconds += time.perf_counter() - clock
            images[output] = unpatchify(x[inside], self.config.patch_size, self.config.channels)

        samples = images.view(Samples)
        broken = np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))
        samples.report = Report(
            seed=None if latents is not None else seed,
            first_sample=first_sample,
            level=self._level(reproducible, ways),
            backend=self.backend.description,
            decoding=decoding,
            passes=tuple(counter.passes[block] for block in range(self.config.blocks)),
            nonfinite=tuple(int(i) + first_sample for i in broken),
            redrawn=tuple(redrawn),
            certificate=certificate,
            seconds=time.perf_counter() - started,
            certificate_seconds=certificate_seconds,
            denoise_seconds=denoise_seconds,
            peak_memory=peak(),
        )
        return samples

    def resolve(
        self,
        n: int,
        *,
        labels: ArrayLike | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        first_sample: int = 0,
        denoise: bool | float | None = None,
    ) -> tuple[NDArray[np.int64], float | None]:
        """What :meth:`sample` would draw, without drawing it: a class (n,) for each sample, below 0 for the null class,
        and the strength of denoising, None for none. Raises InputError for what sample would refuse.
        """
        _, count = check_noise(self.config, n, None, seed, first_sample)
        classes = check_labels(self.config, labels, count)
        (guidance or Guidance()).check(self.config, classes)
        return classes, check_strength(self.config, denoise)

    def noise(self, seed: int | Sequence[int], samples: Sequence[int], stream: int = noise_source.SAMPLING) -> Array:
        """Noise of the given sample indices, of one seed or one each: (N, T, D) standard normal float32. Needs no
        engine.
        """
        return noise_source.normal(seed, samples, (self.config.tokens, self.config.patch_dim), stream)

    def certify(
        self,
        images: ArrayLike,
        noise: ArrayLike,
        labels: ArrayLike | None = None,
        guidance: Guidance | None = None,
    ) -> Array:
        """(N,): the round-trip error of raw samples, made anywhere from ``noise`` (N, T, D); see :class:`Report`."""
        x, classes = check_images(self.config, images, labels)
        z, _ = check_noise(self.config, len(x), noise)
        assert z is not None
        states, _ = self._encode(x, (guidance or Guidance()).branches(self.config.tokens, classes))
        return self._round_trip(states[-1], z)

    def encode(self, images: ArrayLike, labels: ArrayLike | None = None) -> tuple[Array, Array]:
        """Images -> latent (N, T, D), and the log-determinant (N,) in nats per dimension, the reference's mean form."""
        x, classes = check_images(self.config, images, labels)
        latents, log_det = np.empty_like(x), np.empty(len(x), np.float32)
        for rows in _batches(len(x)):
            (*_, latents[rows]), log_det[rows] = self._encode(x[rows], Branches.plain(classes[rows], x.shape[1]))
        return latents, (log_det / latents[0].size).astype(np.float32)

    def denoise(self, images: ArrayLike, labels: ArrayLike | None = None, strength: float = 1.0) -> Array:
        """One step along the score (Tweedie): x + strength * sigma^2 * grad log p(x | labels).

        Raises InputError for a model trained with uniform dequantisation, which has no Gaussian noise to remove.
        """
        checked = check_strength(self.config, float(strength))
        x, classes = check_images(self.config, images, labels)
        assert checked is not None
        found = np.concatenate([self._denoise(x[rows], classes[rows], checked) for rows in _batches(len(x))])
        return unpatchify(found, self.config.patch_size, self.config.channels)

    def log_likelihood(self, images: ArrayLike, labels: ArrayLike | None = None) -> Array:
        """log p(image | label) in nats, (N,), as a density over [-1, 1] pixels, under the unit prior of training."""
        return self.nats_of(self.bits_per_dim(images, labels))

    def bits_per_dim(self, images: ArrayLike, labels: ArrayLike | None = None) -> Array:
        """Bits per dimension, (N,), of 8-bit images given in [-1, 1] units: see :meth:`dequantise`."""
        return self.bits_of(*self.encode(images, labels))

    def bits_of(self, latent: Array, log_det: Array) -> Array:
        """Bits per dimension, (N,), from what :meth:`encode` returned."""
        energy = 0.5 * np.square(latent, dtype=np.float64).mean((1, 2)) + 0.5 * math.log(2 * math.pi) + math.log(128)
        bits: Array = ((energy - log_det) / math.log(2)).astype(np.float32)
        return bits

    def nats_of(self, bits: Array) -> Array:
        """Log-likelihoods in nats, (N,), from bits per dimension; see :meth:`log_likelihood`."""
        dimensions = math.prod(self.config.image)
        return ((math.log(128) - bits.astype(np.float64) * math.log(2)) * dimensions).astype(np.float32)

    def dequantise(self, images: ArrayLike, seed: int = 0, first_sample: int = 0) -> Array:
        """8-bit images (N, channels, size, size) -> the continuous images the model was trained on, in [-1, 1] units.

        Uniform dequantisation, 2 (x + u) / 256 - 1, or x / 127.5 - 1 plus Gaussian noise, whichever the model knows.
        """
        array = np.asarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != self.config.image or array.ndim != 4 or not len(array):
            raise InputError(
                f"images are {array.dtype} of shape {array.shape}; expected uint8 (N, *{self.config.image})"
            )
        indices, stream = range(first_sample, first_sample + len(array)), noise_source.DEQUANTISATION
        if self.config.noise_std is None:
            u = noise_source.uniform(seed, indices, array[0].size, stream).reshape(array.shape)
            return (2 * (array + u) / 256 - 1).astype(np.float32)
        noise = noise_source.normal(seed, indices, self.config.image, stream)
        return (array / np.float32(127.5) - 1 + self.config.noise_std * noise).astype(np.float32)

    # --- one tile, patches in and patches out -------------------------------------------------------------------

    def _decode(
        self,
        z: Array,
        branches: Branches,
        ways: Sequence[Parallel | None],
        counter: _Counter,
        lanes: Lanes | None,
        watch: Callable[[int, Array, float], None] | None = None,
    ) -> Array:
        x = z * self.deviation
        for block in reversed(range(self.config.blocks)):
            clock = time.perf_counter()
            on_step = partial(counter.step, block)
            if lanes is not None:
                x, passes = lanes.solve(block, x, branches, on_step), self.config.tokens - 1
            else:
                decoding = self.backend.decoding(block, x, branches)
                x, passes = solve(decoding, self.config.tokens, ways[block], on_step)
                decoding.close()
            counter.passes[block] += passes
            if watch is not None:
                watch(block, x, time.perf_counter() - clock)
        return x

    def _watch(
        self, preview: Callable[[Preview], None], first: int, inside: slice
    ) -> Callable[[int, Array, float], None]:
        """Shows ``preview`` the wanted rows of a tile, the first of which is sample ``first``."""

        def watch(block: int, x: Array, seconds: float) -> None:
            images = unpatchify(x[inside], self.config.patch_size, self.config.channels)
            preview(Preview(block, first, images, seconds))

        return watch

    def _encode(self, x: Array, branches: Branches) -> tuple[list[Array], Array]:
        """The flow's state before the first block, between blocks, and behind the last; log-determinants in nats."""
        states, log_det = [x], np.zeros(len(x), np.float32)
        for block in range(self.config.blocks):
            state, block_log_det = self.backend.forward(block, states[-1], branches)
            states.append(state)
            log_det = log_det + block_log_det
        return states, log_det

    def _denoise(
        self, x: Array, classes: NDArray[np.int64], strength: float, states: list[Array] | None = None
    ) -> Array:
        """Walk the gradient back through the blocks, from the ``states`` of an unguided :meth:`_encode` of x."""
        assert self.config.noise_std is not None
        if states is None:
            states, _ = self._encode(x, Branches.plain(classes, self.config.tokens))
        grad = -states.pop()
        ones = np.ones(len(x), np.float32)
        for block in reversed(range(self.config.blocks)):
            grad = self.backend.gradient(block, states.pop(), classes, grad, ones)
        return x + np.float32(strength * self.config.noise_std**2) * grad

    def _round_trip(self, found: Array, z: Array) -> Array:
        """(B,): largest difference of encoded samples from the latents they were decoded from."""
        error: Array = np.abs(found - z * self.deviation).max((1, 2))
        return error

    def _redraw(
        self,
        x: Array,
        z: Array,
        branches: Branches,
        ways: Sequence[Parallel | None],
        lanes: Lanes | None,
        indices: range,
        inside: slice,
        seed: int,
    ) -> list[int]:
        """Replace, in place, what is not finite by later attempts of the same sample; the tile keeps its shape."""
        redrawn: list[int] = []
        for attempt in range(1, REDRAWS + 1):
            broken = [row for row in range(len(indices))[inside] if not np.isfinite(x[row]).all()]
            if not broken:
                break
            for row in broken:
                z[row] = self.noise(seed, indices[row : row + 1], stream=attempt)[0]
            x[broken] = self._decode(z, branches, ways, _Counter(None, 0), lanes)[broken]
            redrawn = sorted({*redrawn, *(indices[row] for row in broken)})
        return redrawn

    # --- how it is computed -------------------------------------------------------------------------------------

    @cached_property
    def lanes(self) -> Lanes | None:
        """Threads to divide a batch among, where that can be faster."""
        found = self.backend.lanes()
        return None if found is None else Lanes(*found)

    def _default_batch(self, guidance: Guidance) -> int:
        row = cache_row(self.config, self.bundle.manifest.precision) * (2 if guidance.scale else 1)
        return min(_LARGEST_BATCH, self.backend.largest_batch or _LARGEST_BATCH, self.budget.batch(row))

    def _ways(
        self, mode: str | None, tolerance: float | None, images: int, branches: int, reproducible: bool
    ) -> tuple[str, Sequence[Parallel | None], Lanes | None]:
        """How each block is decoded, and that in words. A reproducible run does not follow what was measured here."""
        plan = None if reproducible else self.plan
        serially: list[Parallel | None] = [None] * self.config.blocks
        chosen = mode or ("serial" if plan is None and tolerance is None else "exact" if not tolerance else "fast")
        limit = tolerance_of(chosen, tolerance)
        lanes = self.lanes if plan is not None and plan.lanes(chosen, images, branches) > 1 and images > 1 else None
        if lanes is not None:
            return f"serially in {lanes.count} lanes, as calibrated", serially, lanes
        if chosen == "serial":
            return "serial", serially, None
        words = f"parallel to {limit:g}"
        if plan is None:
            how = Parallel(self.backend.window, limit, self.config.tokens - 1, steady=reproducible)
            return words, [how] * self.config.blocks, None
        ways = plan.ways(chosen, images, branches, limit) or serially
        return f"{words if any(ways) else 'serially'}, as calibrated", ways, None

    def _level(self, reproducible: bool, ways: Sequence[Parallel | None]) -> str:
        if reproducible:
            return "L1: bitwise the same for any n, batch size and thread count, on this machine and engine"
        agreement = "1e-5" if self.bundle.manifest.precision == "fp32" else f"{self.bundle.manifest.precision} rounding"
        loosest = max((way.tolerance for way in ways if way is not None), default=0.0)
        if loosest > 1e-5:
            agreement = f"the tolerance of {loosest:g} they are solved to, a few times over"
        return f"L2: noise the same anywhere to the bit; samples agree across batch sizes to {agreement}"


class _Counter:
    """Counts sequential steps for whoever watches."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.passes: Counter[int] = Counter()  # by block

    def step(self, block: int, position: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, block, position))


def _batches(count: int) -> list[slice]:
    """Parts of many given images: what is kept of each between the blocks adds up."""
    return [slice(start, start + _LARGEST_BATCH) for start in range(0, count, _LARGEST_BATCH)]


def _tiles(first: int, count: int, size: int, aligned: bool) -> Iterator[tuple[int, int]]:
    """Ranges of sample indices covering ``first ... first + count - 1``; aligned ones begin at multiples of size."""
    start, end = (first // size * size if aligned else first), first + count
    while start < end:
        yield start, (start + size if aligned else min(start + size, end))
        start += size
