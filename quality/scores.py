"""How likely a picture is, and under which class most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.classify import DRAWS as DRAWS
from ..runtime.classify import nats, posterior
from ..runtime.errors import InputError
from ..runtime.flow import Flow
from ..runtime.samples import Progress


@dataclass(frozen=True, slots=True)
class Score:
    """Likelihoods of one picture. ``bits_per_dim`` (draws,) are of p(x), for a model with classes their even mixture.

    ``log_likelihoods`` and ``probabilities`` (classes,) are as in :class:`~tarflow.runtime.classify.Classification`;
    both are None for unconditional models.
    """

    bits_per_dim: NDArray[np.float64]
    log_likelihoods: NDArray[np.float64] | None
    probabilities: NDArray[np.float64] | None


def score(flow: Flow, pixels: NDArray[np.uint8], seed: int, progress: Callable[[Progress], None]) -> Score:
    """The likelihood of ``pixels`` (channels, size, size). ``progress`` is told each batch; its exception cancels."""
    classes = np.arange(flow.config.classes) if flow.config.classes else np.array([-1])
    by_class = nats(flow, pixels[None], classes, seed, progress)[0]  # (draws, classes)
    if not np.isfinite(by_class).all():
        raise InputError("the likelihood of this picture is not finite: it is nothing like the model's images")
    mixture = np.logaddexp.reduce(by_class, axis=1) - math.log(len(classes))
    bits = math.log2(128) - mixture / (math.prod(flow.config.image) * math.log(2))
    if not flow.config.classes:
        return Score(bits, None, None)
    mean = by_class.mean(0)
    return Score(bits, mean, posterior(mean[None])[0])
