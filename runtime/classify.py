"""Which class a picture is of: its exact likelihood under every class, joined by Bayes' rule under an equal prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import noise
from .errors import InputError
from .fields import told
from .inputs import AS_THEY_ARE, Span, as_array, check_images, in_units, integers
from .samples import Progress

if TYPE_CHECKING:
    from .bundle import ModelShape
    from .flow import Flow

DRAWS = 4  # of the dequantisation noise: enough to see how much an answer depends on it
_ROWS = 16  # images encoded at once, and between two looks at whether anybody still waits
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """How likely N images are under each of K classes, and so of which class they are.

    ``classes`` (K,) int64 are the classes compared, in the order of the columns. ``log_likelihoods`` (N, K) are
    log p(x | class) in nats, as a density over [-1, 1] pixels, of 8-bit images the mean of four draws of the training
    noise; ``probabilities`` (N, K) are p(class | x) where each of these classes is equally probable beforehand. Rows of
    images nothing like the model's may be infinite or nan.
    """

    classes: NDArray[np.int64]
    log_likelihoods: Numbers
    probabilities: Numbers

    def ranked(self) -> NDArray[np.int64]:
        """(N, K): the classes of each image, the most probable first."""
        order = np.argsort(-np.nan_to_num(self.log_likelihoods, nan=-np.inf), axis=1, kind="stable")
        return np.asarray(self.classes[order])


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of images: which ``classes`` to compare (None: all), the ``seed`` of the noise that 8-bit images
    get, the ``range`` that floats are in (as of :meth:`Flow.encode`).
    """

    classes: ArrayLike | None = None
    seed: int = 0
    range: Span | None = None


def classify(
    flow: Flow, images: ArrayLike, asked: Question, progress: Callable[[Progress], None] | None = None
) -> Classification:
    """Images (N, channels, size, size), uint8 or floats, under each of some classes; see :meth:`Flow.classify`."""
    classes = _check_classes(flow.config, asked.classes, flow.class_names)
    noise.check(asked.seed, ())
    given = as_array(images, "images")
    if given.ndim != 4 or given.shape[1:] != flow.config.image or not len(given):
        raise InputError.of("images", f"of shape {given.shape}", f"(N, {', '.join(map(str, flow.config.image))})")
    if given.dtype != np.uint8:
        given = in_units(given, asked.range)
        check_images(flow.config, given, None)
    mean = nats(flow, given, classes, asked.seed, progress or (lambda now: None)).mean(1)
    return Classification(classes, mean, posterior(mean))


def nats(
    flow: Flow, images: NDArray[Any], classes: NDArray[np.int64], seed: int, progress: Callable[[Progress], None]
) -> Numbers:
    """log p(image | class), (N, S, K), of S draws of the noise that 8-bit images get, or of one for floats in [-1, 1].

    ``progress`` is told each batch; its exception cancels. A class below 0 is the null class.
    """
    draws, k = (DRAWS if images.dtype == np.uint8 else 1), len(classes)
    found = np.empty(len(images) * draws * k)  # image by image, draw by draw, class by class
    for start in range(0, len(found), _ROWS):
        progress(Progress(start, len(found), -1, 0))  # of no block: all of them run at once
        rows = np.arange(start, min(start + _ROWS, len(found)))
        first, last = rows[0] // k, rows[-1] // k
        seen = images[np.arange(first, last + 1) // draws]
        if draws > 1:  # draw d of image i has the noise of sample i * draws + d
            seen = flow.dequantise(seen, seed, int(first))
        labels = classes[rows % k]
        found[rows] = flow.log_likelihood(seen[rows // k - first], labels, AS_THEY_ARE)
    progress(Progress(len(found), len(found), -1, 0))
    return found.reshape(len(images), draws, k)


def posterior(log_likelihoods: Numbers) -> Numbers:
    """(N, K) -> p(class | x), (N, K), under an equal prior; nan where no likelihood is finite."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(log_likelihoods - np.logaddexp.reduce(log_likelihoods, axis=1, keepdims=True)))


def _check_classes(config: ModelShape, classes: ArrayLike | None, names: tuple[str, ...]) -> NDArray[np.int64]:
    """The classes to compare, (K,); their ``names`` are for messages. Raises InputError."""
    if not config.classes:
        raise InputError.of("classes", "0 in this model", "a model with classes: this one is unconditional")
    if classes is None:
        return np.arange(config.classes)
    array = as_array(classes, "classes", f"a list of {integers(names)}")
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        found = told(classes) if array.dtype.kind in "SU" else f"{array.dtype} of shape {array.shape}"
        raise InputError.of("classes", found, f"a list of {integers(names)}")
    outside = array[(array < 0) | (array >= config.classes)]
    if not len(array) or len(outside) or len(np.unique(array)) != len(array):
        found = "empty" if not len(array) else f"a list with {outside[0]}" if len(outside) else "a list with one twice"
        raise InputError.of("classes", found, f"one or more of 0 to {config.classes - 1}, each once")
    return array.astype(np.int64)
