"""How likely a picture is, and under which class most: exact likelihoods, joined by Bayes' rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError
from ..runtime.flow import Flow
from ..runtime.samples import Progress

DRAWS = 4  # of the dequantisation noise: enough to see how much an answer depends on it
_ROWS = 16  # images encoded at once, and between two looks at whether anybody still waits


@dataclass(frozen=True, slots=True)
class Score:
    """Likelihoods of one picture. ``bits_per_dim`` (draws,) are of p(x), for a model with classes their even mixture.

    ``log_likelihoods`` (classes,) are log p(x | class) in nats, as a density over [-1, 1] pixels, mean of the draws;
    ``probabilities`` (classes,) the classes' posterior under an even prior. Both are None for unconditional models.
    """

    bits_per_dim: NDArray[np.float64]
    log_likelihoods: NDArray[np.float64] | None
    probabilities: NDArray[np.float64] | None


def score(flow: Flow, pixels: NDArray[np.uint8], seed: int, progress: Callable[[Progress], None]) -> Score:
    """The likelihood of ``pixels`` (channels, size, size). ``progress`` is told each batch; its exception cancels."""
    classes = max(flow.config.classes, 1)
    images = flow.dequantise(np.repeat(pixels[None], DRAWS, 0), seed)
    nats = np.empty(DRAWS * classes)  # draw by draw, class by class
    for start in range(0, len(nats), _ROWS):
        progress(Progress(start, len(nats), -1, 0))  # of no block: all of them run at once
        rows = np.arange(start, min(start + _ROWS, len(nats)))
        labels = rows % classes if flow.config.classes else None
        nats[rows] = flow.log_likelihood(images[rows // classes], labels)
    if not np.isfinite(nats).all():
        raise InputError("the likelihood of this picture is not finite: it is nothing like the model's images")
    by_class = nats.reshape(DRAWS, classes)
    dimensions = math.prod(flow.config.image)
    mixture = np.logaddexp.reduce(by_class, axis=1) - math.log(classes)
    bits = math.log2(128) - mixture / (dimensions * math.log(2))
    if not flow.config.classes:
        return Score(bits, None, None)
    mean = by_class.mean(0)
    return Score(bits, mean, np.exp(mean - np.logaddexp.reduce(mean)))
