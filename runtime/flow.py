"""Flow: an opened bundle that draws samples, encodes images, and says how far each result can be trusted.

    from tarflow import Flow

    flow = Flow.open("tarflow-bundle")
    images = flow.sample(64, labels=np.arange(64) % 10, guidance=1.0, certify=True)
    images.certificate.max(), images.log_prob

Shapes: N images, T patches in a sequence, D numbers in a patch. Images are (N, channels, size, size) float32 in
[-1, 1] units, which samples may leave: unclipped. Everything is numpy; a Flow may be used from several threads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from . import noise as noise_source
from .backend import CLOSED, Array, Backend, Branches, check_batch
from .backend import REPRODUCIBLE_TILE as REPRODUCIBLE_TILE
from .bundle import Bundle, ModelShape
from .chain import Chain
from .classify import Classification, Question, classify
from .drawing import Drawing, tiles
from .errors import InputError, Remedy
from .fields import check_keywords, told
from .guidance import Guidance as Guidance
from .image import unpatchify
from .inputs import Span, check_images, check_labels, check_noise, check_strength, in_units
from .lanes import Lanes
from .likelihood import bits_of, dequantised, nats_of
from .memory import USUAL, Budget, cache_row, spend
from .opening import Opening, OpeningKeywords, opening_of
from .plan import Plan, find_plan
from .providers import open_backend
from .request import DrawingKeywords, Request, Resolved, SampleKeywords, resolved
from .samples import CertifiedSamples, Progress, Samples, Watch, suspect_limit
from .ways import ways_of

_LARGEST_BATCH = 64
_UNWATCHED = Watch()


class Flow:
    """A bundle, open on one provider. Create it with :meth:`open`, close it with :meth:`close` or end a ``with``.
    It pickles as what opens the same bundle again. ``plan`` is what was calibrated for this machine.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend = CLOSED, prior_variance: Array | None = None, budget: Budget = USUAL
    ) -> None:
        if backend is CLOSED:
            raise TypeError("Flow() takes an opened bundle and an engine; Flow.open(bundle) opens both")
        self.bundle, self.backend, self.budget = bundle, backend, budget
        self.opening: Opening | None = None  # how it was opened; None if not by `open`
        self.plan: Plan | None = find_plan(bundle, backend.machine)
        self.deviation = np.sqrt(bundle.prior_variance() if prior_variance is None else prior_variance)  # (T, D)
        self.chain = Chain(bundle.manifest.config, backend, self.deviation)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str | Opening = "auto",
        threads: int | None = None,  # third, as Triton repositories written earlier give it
        **opening: Unpack[OpeningKeywords],  # typed: the fields of Opening are in one place
    ) -> Self:
        """Open a bundle, after checking the hashes of its graphs and weights.

        ``provider`` is "auto", "native", "cpu", "cuda" or "tensorrt"; with it go ``threads``, ``spinning``, ``memory``,
        ``cuda_graph`` and ``precision``, see :class:`Opening`, which may be given whole instead. Raises BundleError for
        a damaged bundle or one without engines that fit, MachineError if the provider is not to be had, InputError for
        an unknown one, and for a limit of memory that one image exceeds.
        """
        if not isinstance(bundle, (str, os.PathLike, Bundle)):
            raise InputError.of("bundle", told(bundle), "a bundle's folder")
        how = opening_of(provider, threads, opening)
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        opened.check_runnable()
        budget = spend(opened, how.memory, how.weights_in(opened.manifest.precision) if how.native else None)
        flow = cls(opened, open_backend(opened, how), budget=budget)
        flow.opening = how
        return flow

    def close(self) -> None:
        """Let go of the engine: its memory and threads are free when the calls that run have ended. To draw, encode or
        denoise from then on is an InputError; to close again is none.
        """
        self.backend = self.chain.backend = CLOSED
        self.__dict__.pop("lanes", None)  # whose threads end with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        engine = self.backend.description.partition("; ")[0]  # without why it is no other
        return f"<Flow of '{manifest.name}', {manifest.precision}, on {engine}>"

    def __reduce__(self) -> Any:
        """Pickled as what it takes to open the same bundle, in the same place, in the same way; its hash is checked."""
        if self.opening is None:
            raise TypeError("a Flow that Flow.open did not make cannot be pickled: nothing says how to open it again")
        return _opened_again, (type(self), self.bundle.folder.absolute(), self.bundle.hash, self.opening)

    @property
    def config(self) -> ModelShape:
        return self.bundle.manifest.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, one each; () where the bundle does not say."""
        return self.bundle.manifest.class_names

    @overload
    def sample(
        self, n: int | None = None, *, certify: Literal[True], **how: Unpack[SampleKeywords]
    ) -> CertifiedSamples: ...
    @overload
    def sample(self, n: int | None = None, *, certify: bool = False, **how: Unpack[SampleKeywords]) -> Samples: ...
    def sample(
        self,
        n: int | None = None,
        *,
        certify: bool = False,
        labels: ArrayLike | None = None,
        noise: ArrayLike | None = None,
        **how: Unpack[DrawingKeywords],  # typed: the fields of Request are in one place
    ) -> Samples:
        """Draw samples ``first_sample ... first_sample + n - 1`` of ``seed``, or invert ``noise`` (N, T, D).

        ``labels`` is one class for all or (N,); -1, or None, is the null class. ``certify`` encodes the
        samples again: what is returned has their round-trip errors in ``certificate`` and their log-densities, in nats,
        in ``log_prob``. ``guidance`` (a :class:`Guidance`, or its scale), ``seed``, ``first_sample``, ``denoise``,
        ``batch_size``, ``reproducible``, ``redraw_nonfinite``, ``decode`` and ``tolerance`` are as in
        :class:`Request`. ``progress`` is told each finished position, ``preview`` is shown each batch after each
        block, blocks last to first; an exception of either cancels. Returns :class:`Samples`, (N, channels, size,
        size) float32; raises InputError for inputs that cannot be what was meant.
        """
        check_keywords("Flow.sample", how, ("n", "certify", *SampleKeywords.__annotations__))
        said: dict[str, Any] = dict(how)
        watch = Watch(said.pop("progress", None), said.pop("preview", None))
        guidance = Guidance.of(said.pop("guidance", None))
        latents, count = check_noise(self.config, n, noise)
        dealt = None if labels is None else tuple(check_labels(self.config, labels, count, self.class_names).tolist())
        request = Request(count, dealt, guidance, certify=certify, **said)
        return self.draw(resolved(request, self.config), latents, watch)

    def draw(self, request: Resolved, noise: Array | None = None, watch: Watch = _UNWATCHED) -> Samples:
        """Draw what a request says, or the part of one. ``noise`` (N, T, D) is inverted instead of the request's own.

        Raises InputError for what this model cannot draw, more than fits this engine, and drawing given noise again.
        """
        request = resolved(request, self.config)
        if noise is not None and request.redraw_nonfinite:
            message = "samples of given noise cannot be redrawn: drop `redraw_nonfinite`, or draw by seed"
            raise InputError(message, field="redraw_nonfinite", found=True, expected="False")
        size = REPRODUCIBLE_TILE if request.reproducible else (request.batch_size or self._default_batch(request))
        others = Remedy("build", {"bundle": self.bundle.folder, "batch": (1, size, size)})
        check_batch(size, self.backend.largest_batch, others)
        drawing = Drawing(self.chain, request, ways_of(self, request, min(size, request.n)), noise, watch)
        parts = list(tiles(request.first_sample, request.n, size, aligned=request.reproducible))
        drawing.expect(len(parts))
        started = time.perf_counter()
        for tile, following in zip(parts, [*parts[1:], None], strict=True):
            drawing.draw(tile, following)
        seconds, limit = time.perf_counter() - started, self.suspect_above(drawing.ways.tolerance)
        return drawing.samples(self.bundle.manifest.precision, seconds, limit)

    def noise(self, seed: int | Sequence[int], samples: Sequence[int], stream: int = noise_source.SAMPLING) -> Array:
        """Noise (N, T, D) of sample indices, of one seed or one each: standard normal float32. Needs no engine."""
        return noise_source.normal(seed, samples, (self.config.tokens, self.config.patch_dim), stream)

    def certify(
        self,
        images: ArrayLike,
        noise: ArrayLike,
        labels: ArrayLike | None = None,
        guidance: Guidance | float | None = None,
    ) -> Array:
        """(N,): the round-trip error of raw samples, made anywhere from ``noise`` (N, T, D); see :class:`Report`."""
        x, classes = check_images(self.config, images, labels, self.class_names)
        z, _ = check_noise(self.config, len(x), noise)
        assert z is not None
        states, _ = self.chain.encode(x, Guidance.of(guidance).branches(self.config.tokens, classes))
        return self.chain.round_trip(states[-1], z)

    def encode(
        self, images: ArrayLike, labels: ArrayLike | None = None, range: Span | None = None
    ) -> tuple[Array, Array]:
        """Images -> latent (N, T, D), and the log-determinant (N,) in nats per dimension, the reference's mean form.

        ``range`` is the floats' own: (-1, 1) takes them as they are, (0, 1) and (0, 255), which they may leave by half
        the width, are scaled to that. Without one, values beyond [-8, 8] are refused, and those that may be in [0, 1]
        warned of. Results of images nothing like the model's may be infinite or nan. Raises InputError for what cannot
        be such images.
        """
        x, classes = check_images(self.config, in_units(images, range), labels, self.class_names)
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
        checked = check_strength(self.config, strength, "strength")
        x, classes = check_images(self.config, in_units(images, range), labels, self.class_names)
        assert checked is not None
        found = np.concatenate([self.chain.denoise(x[rows], classes[rows], checked) for rows in _batches(len(x))])
        return unpatchify(found, self.config.patch_size, self.config.channels)

    def log_likelihood(self, images: ArrayLike, labels: ArrayLike | None = None, range: Span | None = None) -> Array:
        """log p(image | label), (N,) nats over [-1, 1] pixels, under the unit prior; ``range``: :meth:`encode`."""
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
        """Bits per dimension (N,) of :meth:`dequantise`'s 8-bit images in [-1, 1] units; ``range``: :meth:`encode`."""
        return self.bits_of(*self.encode(images, labels, range))

    def bits_of(self, latent: Array, log_det: Array) -> Array:
        """Bits per dimension, (N,), from what :meth:`encode` returned."""
        return bits_of(latent, log_det)

    def nats_of(self, bits: Array) -> Array:
        """Log-likelihoods in nats, (N,), from bits per dimension; see :meth:`log_likelihood`."""
        return nats_of(bits, math.prod(self.config.image))

    def dequantise(self, images: ArrayLike, seed: int = 0, first_sample: int = 0) -> Array:
        """8-bit images (N, channels, size, size) -> the continuous images the model was trained on, in [-1, 1] units.

        Uniform dequantisation, 2 (x + u) / 256 - 1, or x / 127.5 - 1 plus Gaussian noise, whichever the model knows.
        The noise is a function of ``seed`` and index alone. Raises InputError for what are no such images.
        """
        return dequantised(self.config, images, seed, first_sample)

    @cached_property
    def lanes(self) -> Lanes | None:
        """Threads to divide a batch among, where that can be faster."""
        found = self.backend.lanes()
        return None if found is None else Lanes(*found)

    def _default_batch(self, request: Request) -> int:
        row = cache_row(self.config, self.bundle.manifest.precision) * (2 if request.guidance.scale else 1)
        return min(_LARGEST_BATCH, self.backend.largest_batch or _LARGEST_BATCH, self.budget.batch(row))

    def suspect_above(self, tolerance: float = 0.0) -> float:
        """The round-trip error above which a sample decoded to a tolerance (0: serially) is suspect."""
        return suspect_limit(self.bundle.manifest.certificate_limit(self.backend.precision), tolerance)


def _opened_again(kind: type[Flow], folder: Path, hash: str, opening: Opening) -> Flow:
    """A flow from its pickle. Raises BundleError for another bundle than it was made of."""
    bundle = Bundle.open(folder)
    bundle.check_identity(hash)
    return kind.open(bundle, opening)


def _batches(count: int) -> list[slice]:
    """Parts of many given images: what is kept of each between the blocks adds up."""
    return [slice(start, start + _LARGEST_BATCH) for start in range(0, count, _LARGEST_BATCH)]
