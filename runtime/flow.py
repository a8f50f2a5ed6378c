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
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self, Unpack

import numpy as np
from numpy.typing import ArrayLike

from . import noise as noise_source
from .backend import REPRODUCIBLE_TILE as REPRODUCIBLE_TILE
from .backend import Array, Backend, Branches, check_batch
from .bundle import Bundle, ModelShape
from .chain import Chain, Ways
from .classify import Classification, Question, classify
from .decode import Parallel, tolerance_of
from .drawing import Drawing, tiles
from .errors import InputError, Remedy
from .guidance import Guidance as Guidance
from .image import unpatchify
from .inputs import Span, check_images, check_labels, check_noise, check_strength, in_units
from .lanes import Lanes
from .memory import USUAL, Budget, cache_row, peak, spend
from .opening import Opening, OpeningKeywords, opening_of
from .plan import Plan, find_plan
from .providers import open_backend
from .request import UNGUIDED, Request, RequestKeywords, Resolved
from .samples import Preview, Progress, Report, Samples, Watch, nonfinite, suspect_limit

_LARGEST_BATCH = 64
_UNWATCHED = Watch()


class Flow:
    """A bundle, open on one provider. Create it with :meth:`open`. ``plan`` is what was calibrated for this machine."""

    def __init__(
        self, bundle: Bundle, backend: Backend, prior_variance: Array | None = None, budget: Budget = USUAL
    ) -> None:
        self.bundle, self.backend, self.budget = bundle, backend, budget
        self.plan: Plan | None = find_plan(bundle, backend.machine)
        self.deviation = np.sqrt(bundle.prior_variance() if prior_variance is None else prior_variance)  # (T, D)
        self.chain = Chain(bundle.manifest.config, backend, self.deviation)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str | Opening = "cpu",
        threads: int | None = None,  # third, as Triton repositories written earlier give it
        **opening: Unpack[OpeningKeywords],  # typed: the fields of Opening are in one place
    ) -> Self:
        """Open a bundle, after checking the hashes of its graphs and weights.

        ``provider`` is "cpu", "cuda", "tensorrt" or "auto"; with it go ``threads``, ``spinning``, ``memory`` and
        ``cuda_graph``, see :class:`Opening`, which may be given whole instead. Raises BundleError for a damaged bundle
        or one without engines that fit, MachineError if the provider is not to be had, InputError for an unknown one,
        and for a limit of memory that one image exceeds.
        """
        how = opening_of(provider, threads, opening)
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        opened.check_runnable()
        budget = spend(opened, how.memory)
        return cls(opened, open_backend(opened, how), budget=budget)

    @property
    def config(self) -> ModelShape:
        return self.bundle.manifest.config

    def sample(
        self,
        n: int | None = None,
        *,
        noise: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        progress: Callable[[Progress], None] | None = None,
        preview: Callable[[Preview], None] | None = None,
        **how: Unpack[RequestKeywords],  # typed: the fields of Request are in one place
    ) -> Samples:
        """Draw samples ``first_sample ... first_sample + n - 1`` of ``seed``, or invert ``noise`` (N, T, D).

        ``labels`` is one class for all or (N,); -1, or None, is the null class. ``guidance``, ``seed``,
        ``first_sample``, ``denoise``, ``certify``, ``batch_size``, ``reproducible``, ``redraw_nonfinite``, ``decode``
        and ``tolerance`` are as in :class:`Request`. ``progress`` is told each finished position, ``preview`` is shown
        each batch after each block, blocks last to first; an exception of either cancels. Returns :class:`Samples`;
        raises InputError for inputs that cannot be what was meant.
        """
        latents, count = check_noise(self.config, n, noise)
        dealt = None if labels is None else tuple(check_labels(self.config, labels, count).tolist())
        said = {name: value for name, value in how.items() if value is not None}
        request = Request(count, dealt, **said)  # type: ignore[arg-type]  # fields, by their names
        return self.draw(request.resolved(self.config), latents, Watch(progress, preview))

    def draw(self, request: Resolved, noise: Array | None = None, watch: Watch = _UNWATCHED) -> Samples:
        """Draw what a request says, or the part of one. ``noise`` (N, T, D) is inverted instead of the request's own.

        Raises InputError for more than fits this engine, and for drawing given noise again.
        """
        if noise is not None and request.redraw_nonfinite:
            raise InputError("samples of given noise cannot be redrawn: drop `redraw_nonfinite`, or draw by seed")
        size = REPRODUCIBLE_TILE if request.reproducible else (request.batch_size or self._default_batch(request))
        others = Remedy("build", {"bundle": self.bundle.folder, "batch": (1, size, size)})
        check_batch(size, self.backend.largest_batch, others)
        drawing = Drawing(self.chain, request, self._ways(request, min(size, request.n)), noise, watch)
        parts = list(tiles(request.first_sample, request.n, size, aligned=request.reproducible))
        drawing.total = len(parts) * self.config.blocks * (self.config.tokens - 1)
        started = time.perf_counter()
        for tile in parts:
            drawing.draw(tile)
        return self._reported(drawing, None if noise is not None else request.seed, time.perf_counter() - started)

    def noise(self, seed: int | Sequence[int], samples: Sequence[int], stream: int = noise_source.SAMPLING) -> Array:
        """Noise of the given sample indices, of one seed or one each: (N, T, D) standard normal float32. Needs no
        engine.
        """
        return noise_source.normal(seed, samples, (self.config.tokens, self.config.patch_dim), stream)

    def certify(
        self, images: ArrayLike, noise: ArrayLike, labels: ArrayLike | None = None, guidance: Guidance | None = None
    ) -> Array:
        """(N,): the round-trip error of raw samples, made anywhere from ``noise`` (N, T, D); see :class:`Report`."""
        x, classes = check_images(self.config, images, labels)
        z, _ = check_noise(self.config, len(x), noise)
        assert z is not None
        states, _ = self.chain.encode(x, (guidance or UNGUIDED).branches(self.config.tokens, classes))
        return self.chain.round_trip(states[-1], z)

    def encode(
        self, images: ArrayLike, labels: ArrayLike | None = None, range: Span | None = None
    ) -> tuple[Array, Array]:
        """Images -> latent (N, T, D), and the log-determinant (N,) in nats per dimension, the reference's mean form.

        ``range`` is the floats' own: (-1, 1) takes them as they are, (0, 1) and (0, 255) are scaled to that. Without
        one, values beyond [-8, 8] are refused, and those that may be in [0, 1] warned of. Results of images nothing
        like the model's may be infinite or nan. Raises InputError for what cannot be such images.
        """
        x, classes = check_images(self.config, in_units(images, range), labels)
        latents, log_det = np.empty_like(x), np.empty(len(x), np.float32)
        for rows in _batches(len(x)):
            (*_, latents[rows]), log_det[rows] = self.chain.encode(x[rows], Branches.plain(classes[rows], x.shape[1]))
        return latents, (log_det / latents[0].size).astype(np.float32)

    def denoise(
        self,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        strength: float = 1.0,
        range: Span | None = None,
    ) -> Array:
        """One step along the score (Tweedie): x + strength * sigma^2 * grad log p(x | labels).

        ``range`` is as in :meth:`encode`. Raises InputError for a model trained with uniform dequantisation, which has
        no Gaussian noise to remove.
        """
        checked = check_strength(self.config, float(strength), "strength")
        x, classes = check_images(self.config, in_units(images, range), labels)
        assert checked is not None
        found = np.concatenate([self.chain.denoise(x[rows], classes[rows], checked) for rows in _batches(len(x))])
        return unpatchify(found, self.config.patch_size, self.config.channels)

    def log_likelihood(self, images: ArrayLike, labels: ArrayLike | None = None, range: Span | None = None) -> Array:
        """log p(image | label) in nats, (N,), as a density over [-1, 1] pixels, under the unit prior of training.

        ``range`` is as in :meth:`encode`.
        """
        return self.nats_of(self.bits_per_dim(images, labels, range))

    def classify(
        self,
        images: ArrayLike,
        classes: ArrayLike | None = None,
        *,
        seed: int = 0,
        range: Span | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Classification:
        """Which class images (N, channels, size, size) are of, by their exact likelihood under each: Bayes' rule.

        8-bit images get the training noise, four draws by ``seed``; floats are taken as they are, ``range`` is as in
        :meth:`encode`. ``classes`` (K,) are those to compare, by default all, each equally probable beforehand.
        ``progress`` is told each batch; its exception cancels. Raises InputError for a model without classes, and for
        what cannot be such images or classes.
        """
        return classify(self, images, Question(classes, seed, range), progress)

    def bits_per_dim(self, images: ArrayLike, labels: ArrayLike | None = None, range: Span | None = None) -> Array:
        """Bits per dimension, (N,), of 8-bit images given in [-1, 1] units: see :meth:`dequantise`.

        ``range`` is as in :meth:`encode`.
        """
        return self.bits_of(*self.encode(images, labels, range))

    def bits_of(self, latent: Array, log_det: Array) -> Array:
        """Bits per dimension, (N,), from what :meth:`encode` returned."""
        energy = 0.5 * np.square(latent, dtype=np.float64).mean((1, 2)) + 0.5 * math.log(2 * math.pi) + math.log(128)
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and whoever asks must see that
            return np.asarray((energy - log_det) / math.log(2), np.float32)

    def nats_of(self, bits: Array) -> Array:
        """Log-likelihoods in nats, (N,), from bits per dimension; see :meth:`log_likelihood`."""
        dimensions = math.prod(self.config.image)
        with np.errstate(over="ignore"):
            return ((math.log(128) - bits.astype(np.float64) * math.log(2)) * dimensions).astype(np.float32)

    def dequantise(self, images: ArrayLike, seed: int = 0, first_sample: int = 0) -> Array:
        """8-bit images (N, channels, size, size) -> the continuous images the model was trained on, in [-1, 1] units.

        Uniform dequantisation, 2 (x + u) / 256 - 1, or x / 127.5 - 1 plus Gaussian noise, whichever the model knows.
        """
        array = np.asarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != self.config.image or array.ndim != 4 or not len(array):
            shape = ", ".join(map(str, self.config.image))
            raise InputError.of("images", f"{array.dtype} of shape {array.shape}", f"uint8 (N, {shape})")
        indices, stream = range(first_sample, first_sample + len(array)), noise_source.DEQUANTISATION
        if self.config.noise_std is None:
            u = noise_source.uniform(seed, indices, array[0].size, stream).reshape(array.shape)
            return (2 * (array + u) / 256 - 1).astype(np.float32)
        noise = noise_source.normal(seed, indices, self.config.image, stream)
        return (array / np.float32(127.5) - 1 + self.config.noise_std * noise).astype(np.float32)

    # --- how it is computed -------------------------------------------------------------------------------------

    @cached_property
    def lanes(self) -> Lanes | None:
        """Threads to divide a batch among, where that can be faster."""
        found = self.backend.lanes()
        return None if found is None else Lanes(*found)

    def _default_batch(self, request: Request) -> int:
        row = cache_row(self.config, self.bundle.manifest.precision) * (2 if request.guidance.scale else 1)
        return min(_LARGEST_BATCH, self.backend.largest_batch or _LARGEST_BATCH, self.budget.batch(row))

    def _ways(self, request: Request, images: int) -> Ways:
        """How each block is decoded. A reproducible run does not follow what was measured here."""
        plan, branches = None if request.reproducible else self.plan, 2 if request.guidance.scale else 1
        serially: tuple[Parallel | None, ...] = (None,) * self.config.blocks
        by_tolerance = "exact" if not request.tolerance else "fast"
        mode = request.decode or ("serial" if plan is None and request.tolerance is None else by_tolerance)
        limit = tolerance_of(mode, request.tolerance)
        if plan is not None and images > 1 and plan.lanes(mode, images, branches) > 1 and self.lanes is not None:
            return Ways(f"serially in {self.lanes.count} lanes, as calibrated", serially, self.lanes)
        if mode == "serial":
            return Ways("serial", serially)
        words = f"parallel to {limit:g}"
        if plan is None:
            how = Parallel(self.backend.window, limit, self.config.tokens - 1, steady=request.reproducible)
            return Ways(words, (how,) * self.config.blocks)
        blocks = plan.ways(mode, images, branches, limit) or serially
        return Ways(f"{words if any(blocks) else 'serially'}, as calibrated", blocks)

    def _reported(self, drawing: Drawing, seed: int | None, seconds: float) -> Samples:
        samples, first = drawing.images.view(Samples), drawing.request.first_sample
        samples.report = Report(
            seed=seed,
            first_sample=first,
            level=self._level(drawing),
            backend=self.backend.description,
            decoding=drawing.ways.words,
            passes=tuple(drawing.passes.tolist()),
            nonfinite=tuple(row + first for row in nonfinite(drawing.images)),
            redrawn=tuple(drawing.redrawn),
            certificate=drawing.certificate,
            seconds=seconds,
            certificate_seconds=drawing.certificate_seconds,
            denoise_seconds=drawing.denoise_seconds,
            peak_memory=peak(),
            suspect_above=self.suspect_above(drawing.ways.tolerance),
        )
        return samples

    def suspect_above(self, tolerance: float = 0.0) -> float:
        """The round-trip error above which a sample decoded to a tolerance (0: serially) is suspect."""
        return suspect_limit(self.bundle.manifest.certificate_limit(self.backend.precision), tolerance)

    def _level(self, drawing: Drawing) -> str:
        if drawing.request.reproducible:
            return "L1: bitwise the same for any n, batch size and thread count, on this machine and engine"
        if self.backend.portable and not drawing.ways.tolerance:
            return "L1: bitwise the same for any n, batch size, thread count and processor, before denoising"
        agreement = "1e-5" if self.bundle.manifest.precision == "fp32" else f"{self.bundle.manifest.precision} rounding"
        if drawing.ways.tolerance > 1e-5:
            agreement = f"the tolerance of {drawing.ways.tolerance:g} they are solved to, a few times over"
        return f"L2: noise the same anywhere to the bit; samples agree across batch sizes to {agreement}"


def _batches(count: int) -> list[slice]:
    """Parts of many given images: what is kept of each between the blocks adds up."""
    return [slice(start, start + _LARGEST_BATCH) for start in range(0, count, _LARGEST_BATCH)]
