"""What to draw: which samples of which noise, of what classes, decoded and denoised how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from . import noise
from .backend import Labels
from .bundle import ModelShape
from .decode import tolerance_of
from .errors import InputError
from .fields import check_field, is_flag, told
from .guidance import Guidance
from .inputs import check_labels, check_strength
from .samples import Preview, Progress

UNGUIDED = Guidance()


@dataclass(frozen=True, slots=True)
class Request:
    """Samples ``first_sample ... first_sample + n - 1`` of ``seed``, with all that fixes how they are drawn.

    ``labels`` are dealt out in turn, beginning at the first sample; None, or -1, is the null class. ``denoise``
    None means wherever the model has Gaussian noise to remove; a number is a strength, the factor on sigma^2.
    ``certify`` encodes the samples again. ``redraw_nonfinite`` draws those that overflow again. ``decode`` is
    "serial", "exact" (in parallel, until a patch changes by no more than 1e-5) or "fast" (1e-3): where it stops,
    not the error of samples, which was up to 2e-5 and 2e-3 where it was measured; ``tolerance`` is another limit;
    None means exact by this machine's plan, or serial where there is none. ``reproducible`` computes in aligned
    tiles of 16 rows, so that a sample is bitwise the same whatever n, ``batch_size`` and thread count on one
    machine.

    Raises InputError for what no model could draw.
    """

    n: int
    labels: tuple[int, ...] | None = None
    guidance: Guidance = UNGUIDED
    seed: int = 0
    first_sample: int = 0
    denoise: bool | float | None = None
    certify: bool = False
    redraw_nonfinite: bool = False
    decode: str | None = None
    tolerance: float | None = None
    reproducible: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.n < 1:
            raise InputError.of("n", self.n, "1 or more samples")
        noise.check(self.seed, (self.first_sample, self.first_sample + self.n - 1))
        if self.denoise is not None and not 0 <= float(self.denoise) < math.inf:
            raise InputError.of("denoise", self.denoise, "a strength of 0 or more, 1 is the theory's")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError.of("batch_size", self.batch_size, "1 or more")
        if self.labels is not None and not self.labels:
            raise InputError.of("labels", "empty", "one label or more, to deal out in turn")
        if self.decode is not None or self.tolerance is not None:
            tolerance_of(self.decode or "fast", self.tolerance)

    def _check_types(self) -> None:
        for name in ("n", "seed", "first_sample"):
            check_field(name, getattr(self, name), "an integer")
        for name in ("certify", "redraw_nonfinite", "reproducible"):
            check_field(name, getattr(self, name), "True or False")
        check_field("batch_size", self.batch_size, "an integer", optional=True)
        check_field("decode", self.decode, "a string", optional=True)
        check_field("tolerance", self.tolerance, "a number", optional=True)
        if not is_flag(self.denoise):
            check_field("denoise", self.denoise, "a number", optional=True)
        if self.labels is not None and not isinstance(self.labels, (tuple, list)):
            raise InputError.of("labels", told(self.labels), "a tuple of integers, or None")
        if not isinstance(self.guidance, Guidance):
            raise InputError.of("guidance", told(self.guidance), "a Guidance")

    def resolved(self, config: ModelShape) -> Resolved:
        """The request as this model draws it. Raises InputError for labels it does not have, guidance that does nothing
        for all these samples, and denoising of a model that has no noise to remove.
        """
        if isinstance(self, Resolved):
            return self
        if self.labels is not None:
            used = self.labels[: self.n]
            check_labels(config, used, len(used))
        strength = check_strength(config, self.denoise)
        mine = {field.name: getattr(self, field.name) for field in fields(Request)}
        found = Resolved(**mine | {"denoise": False if strength is None else strength})
        self.guidance.check(config, found.classes(min(self.n, len(self.labels or (-1,)))))
        return found


class RequestKeywords(TypedDict, total=False):
    """Fields of :class:`Request` but ``n``, ``labels`` and ``certify``, as keywords of ``Flow.sample``, where a number
    is a guidance too; None, where it may be, is the default.
    """

    guidance: Guidance | float | None
    seed: int
    first_sample: int
    denoise: bool | float | None
    redraw_nonfinite: bool
    decode: str | None
    tolerance: float | None
    reproducible: bool
    batch_size: int | None


class DrawingKeywords(RequestKeywords, total=False):
    """The same, and who is told."""

    progress: Callable[[Progress], None] | None
    preview: Callable[[Preview], None] | None


class SampleKeywords(DrawingKeywords, total=False):
    """All keywords of ``Flow.sample`` but ``certify``."""

    labels: ArrayLike | None
    noise: ArrayLike | None


@dataclass(frozen=True, slots=True)
class Resolved(Request):
    """A request that was checked against a model, once, by :meth:`Request.resolved`. Its parts are checked too."""

    def part(self, first_sample: int, n: int) -> Resolved:
        """The same, of some of its samples alone."""
        labels = self.labels
        if labels is not None and len(labels) > 1:
            turn = first_sample - self.first_sample
            labels = tuple(labels[(turn + k) % len(labels)] for k in range(n))
        return replace(self, n=n, first_sample=first_sample, labels=labels)

    def classes(self, count: int | None = None) -> Labels:
        """A class for each sample, or for the first few, (n,): below 0 for the null class."""
        return np.resize(np.array(self.labels or (-1,), np.int64), self.n if count is None else count)

    @property
    def strength(self) -> float | None:
        """The factor on sigma^2 when denoising; None: not denoised."""
        return None if self.denoise is False else float(self.denoise or 0)


def resolved(request: Request, config: ModelShape) -> Resolved:
    """What :meth:`Request.resolved` gives. Raises InputError for what is no request, too."""
    if not isinstance(request, Request):
        raise InputError.of("request", told(request), "a Request")
    return request.resolved(config)
