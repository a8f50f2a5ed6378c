"""What a caller said, checked: noise, labels, images, denoising. Everything here raises InputError, with the cure."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backend import Array, Labels
from .bundle import ModelShape
from .errors import InputError
from .fields import check_field, is_flag, told
from .image import patchify

Span = tuple[float, float]
SPANS: dict[str, Span] = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0), "0,255": (0.0, 255.0)}
AS_THEY_ARE = SPANS["-1,1"]
AMBIGUOUS = "no value is negative and none above 1: taken as images in [-1, 1], not in [0, 1]"

_LARGEST_VALUE = 8.0  # of a picture in [-1, 1] units: noise and guidance leave the interval, but not as far
_FARTHEST = 2.0  # of floats said to be in another range, in the same units: half its width beyond either end
_MOST_NAMES = 20  # of classes in a message
_LARGEST_RESULT = 1 << 40  # bytes; a slip of the keyboard, not a request


def check_noise(config: ModelShape, n: int | None, noise: ArrayLike | None) -> tuple[Array | None, int]:
    """Noise that was given, (N, T, D), or None for noise by seed; and N."""
    shape = (config.tokens, config.patch_dim)
    if noise is None:
        if n is None:
            wanted = "`n`, the number of samples, or `noise`"
            raise InputError(f"nothing to draw: give {wanted}", field="n", found="nothing", expected=wanted)
        check_field("n", n, "an integer")
        if n < 1:
            raise InputError.of("n", n, "1 or more samples")
        if n * math.prod(config.image) * 4 > _LARGEST_RESULT:
            most = f"{_LARGEST_RESULT >> 40} TiB of samples at most"
            raise InputError.of("n", n, most, "draw them in parts, by `first_sample`")
        return None, int(n)
    array = as_array(noise, "noise")
    if array.ndim != 3 or array.shape[1:] != shape or not len(array):
        expected = f"(N, {shape[0]}, {shape[1]}): samples, patches, numbers in a patch"
        raise InputError.of("noise", f"of shape {array.shape}", expected)
    if array.dtype.kind not in "fiu":
        raise InputError.of("noise", f"of type {array.dtype}", "float32")
    check_field("n", n, "an integer", optional=True)
    if n is not None and n != len(array):
        raise InputError.of("n", n, f"{len(array)}, as many as `noise` holds", "drop one of the two")
    return _finite(array, "noise"), len(array)


def check_labels(config: ModelShape, labels: ArrayLike | None, count: int, names: Sequence[str] = ()) -> Labels:
    """A class for each of ``count`` samples, -1 for the null class. ``names`` of classes are for messages."""
    if labels is None:
        return np.full(count, -1, np.int64)
    array = as_array(labels, "labels", integers(names))
    if array.dtype.kind not in "iu":
        found = told(labels) if array.dtype.kind in "SU" else f"of type {array.dtype}"
        raise InputError.of("labels", found, integers(names))
    if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
        raise InputError.of("labels", f"of shape {array.shape}", f"one label or ({count},), one a sample")
    if not config.classes and (array != -1).any():
        message, first = "this model is unconditional and takes no `labels`; drop them", int(array[array != -1].flat[0])
        raise InputError(message, field="labels", found=first, expected="none")
    wrong = array[(array < -1) | (array >= config.classes)] if array.size else array
    if wrong.size:
        first = int(wrong.flat[0])
        raise InputError(
            f"label {first} is out of range; this model has classes 0 to {config.classes - 1}, and -1 for none",
            field="labels",
            found=first,
            expected=f"-1 to {config.classes - 1}",
        )
    return np.broadcast_to(array.astype(np.int64), (count,)).copy()


def check_images(
    config: ModelShape, images: ArrayLike, labels: ArrayLike | None, names: Sequence[str] = ()
) -> tuple[Array, Labels]:
    """Images as patches (N, T, D), and a class for each; ``names`` as of :func:`check_labels`."""
    array = as_array(images, "images")
    if array.ndim != 4 or array.shape[1:] != config.image or not len(array):
        raise InputError.of("images", f"of shape {array.shape}", f"(N, {', '.join(map(str, config.image))})")
    if array.dtype.kind != "f":
        raise InputError.of("images", f"of type {array.dtype}", "floats in [-1, 1]", "dequantise 8-bit images first")
    patches = patchify(_finite(array, "images"), config.patch_size)
    return patches, check_labels(config, labels, len(array), names)


def in_units(images: ArrayLike, span: Span | None) -> NDArray[Any]:
    """Images in [-1, 1] units, of floats over a ``span``; integers are left as they are.

    Of no span, they are taken to be in these units, with a warning if they may be in [0, 1]. Floats said to be in
    [-1, 1] are taken as they are, however large. Raises InputError for those that cannot be pictures or are clearly
    outside of the span, and for a span that is not in SPANS.
    """
    if span is not None and not (isinstance(span, tuple) and span in SPANS.values()):
        raise InputError.of("range", told(span), "(-1, 1), (0, 1) or (0, 255)")
    array = as_array(images, "images")
    if array.dtype.kind != "f" or span == AS_THEY_ARE:
        return array
    if span is None:
        if is_ambiguous(array):
            warnings.warn(AMBIGUOUS, stacklevel=_callers_level())
        return check_bounded(array)
    low, high = span
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as not finite, elsewhere
        found = ((array - low) * (2 / (high - low)) - 1).astype(np.float32)
    if _is_beyond(_FARTHEST, found):
        values = f"an array of {array.min():g} to {array.max():g}"
        advice = "they may leave it by half its width at most"
        raise InputError.of("images", values, f"floats in [{low:g}, {high:g}], the `range` that was given", advice)
    return found


def is_ambiguous(images: NDArray[Any]) -> bool:
    """Whether floats may as well be in [0, 1] as in [-1, 1]."""
    return bool(images.size) and bool(images.min() >= 0) and bool(images.max() <= 1)


def check_bounded(images: NDArray[Any]) -> NDArray[Any]:
    """The images; InputError if they cannot be pictures in [-1, 1] units."""
    if _is_beyond(_LARGEST_VALUE, images):
        raise InputError.of(
            "images", f"an array up to {np.abs(images).max():g}", "floats in [-1, 1]", "scale them to that"
        )
    return images


def _is_beyond(most: float, images: NDArray[Any]) -> bool:
    """Whether a value lies farther from 0 than ``most``. What is not finite in float32 is refused elsewhere."""
    return most < float(np.abs(images).max(initial=0)) <= float(np.finfo(np.float32).max)


def _callers_level() -> int:
    """The ``stacklevel`` at which a warning of the function that asks points at the line that called this package."""
    ours, level, frame = f"{__name__.partition('.')[0]}.", 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


def check_strength(config: ModelShape, denoise: bool | float | None, field: str = "denoise") -> float | None:
    """The factor on sigma^2, or None for no denoising. ``field`` is what the caller calls it."""
    if not is_flag(denoise):
        check_field(field, denoise, "a number", optional=True)
    if denoise is None:
        return 1.0 if config.noise_std else None
    if denoise is False:
        return None
    if config.noise_std is None:
        raise InputError(
            "this model was trained with uniform dequantisation: there is no Gaussian noise to remove; do not denoise",
            field=field,
            found=denoise,
            expected="False",
        )
    if not 0 <= float(denoise) < math.inf:
        raise InputError.of(field, denoise, "a strength of 0 or more, 1 is the theory's")
    return float(denoise)


def as_array(given: ArrayLike, field: str, expected: str = "an array") -> NDArray[Any]:
    """What was given, as numpy has it. Raises InputError for what is no array, such as text, None, or rows of
    different lengths.
    """
    if field == "images":
        expected = "an array of images, (N, channels, size, size); read pictures into one first"
    if given is None or isinstance(given, (str, bytes, os.PathLike)):
        raise InputError.of(field, told(given), expected)
    try:
        return np.asarray(given)
    except (ValueError, TypeError) as error:
        raise InputError.of(field, told(given), "an array", str(error).splitlines()[0]) from None


def integers(names: Sequence[str]) -> str:
    """What is expected of classes: integers, and which of them the first of ``names`` are."""
    listed = [f"{label} {name}" for label, name in enumerate(names[:_MOST_NAMES])]
    more = [f"... {len(names) - 1} {names[-1]}"] if len(names) > _MOST_NAMES else []
    return "integers" + (f": {', '.join(listed + more)}" if names else "")


def _finite(array: NDArray[Any], field: str) -> Array:
    """The array in float32; InputError if it is not finite, before or after."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        found = np.ascontiguousarray(array, np.float32)
    rows = np.flatnonzero(~np.isfinite(found).all(tuple(range(1, found.ndim))))
    if len(rows):
        raise InputError(
            f"{len(rows)} of {len(found)} samples in `{field}` are not finite, the first at row {rows[0]}",
            field=field,
            found=f"not finite in {len(rows)} of {len(found)} rows",
            expected="finite numbers",
        )
    return found
