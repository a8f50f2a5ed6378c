"""What a caller said, checked: noise, labels, images, denoising. Everything here raises InputError, with the cure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import noise as noise_source
from .backend import Array
from .bundle import ModelShape
from .errors import InputError
from .image import patchify

_LARGEST_RESULT = 1 << 40  # bytes; a slip of the keyboard, not a request


def check_noise(
    config: ModelShape, n: int | None, noise: ArrayLike | None, seed: int = 0, first_sample: int = 0
) -> tuple[Array | None, int]:
    """Noise that was given, (N, T, D), or None for noise by seed; and N."""
    shape = (config.tokens, config.patch_dim)
    if noise is None:
        if n is None:
            raise InputError("nothing to draw: give n, the number of samples, or noise")
        if n < 1 or n != int(n):
            raise InputError(f"n is {n}; expected 1 or more samples")
        if n * math.prod(config.image) * 4 > _LARGEST_RESULT:
            raise InputError(
                f"n is {n}: more than {_LARGEST_RESULT >> 40} TiB of samples; draw them in parts, by first_sample"
            )
        noise_source.check(seed, (first_sample, first_sample + n - 1))
        return None, int(n)
    array = np.asarray(noise)
    if array.ndim != 3 or array.shape[1:] != shape or not len(array):
        raise InputError(
            f"noise has shape {array.shape}; expected (N, {shape[0]}, {shape[1]}): samples, patches, numbers in a patch"
        )
    if array.dtype.kind not in "fiu":
        raise InputError(f"noise has type {array.dtype}; expected float32")
    if n is not None and n != len(array):
        raise InputError(f"n is {n} but noise holds {len(array)} samples; drop one of the two")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        latents = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(latents).all():
        bad = np.flatnonzero(~np.isfinite(latents).all((1, 2)))
        raise InputError(f"noise is not finite in {len(bad)} of {len(array)} samples, the first at row {bad[0]}")
    return latents, len(latents)


def check_labels(config: ModelShape, labels: ArrayLike | None, count: int) -> NDArray[np.int64]:
    """A class for each of ``count`` samples, below 0 for the null class."""
    if labels is None:
        return np.full(count, -1, np.int64)
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.dtype == bool:
        raise InputError(f"labels have type {array.dtype}; expected integers")
    if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
        raise InputError(f"labels have shape {array.shape}; expected one label or ({count},), one a sample")
    if not config.classes:
        if (array >= 0).any():
            raise InputError("this model is unconditional and takes no labels; drop them")
    elif array.size and array.max() >= config.classes:
        raise InputError(
            f"label {array.max()} is out of range; this model has classes 0 to {config.classes - 1}, and -1 for none"
        )
    return np.broadcast_to(array.astype(np.int64), (count,)).copy()


def check_images(config: ModelShape, images: ArrayLike, labels: ArrayLike | None) -> tuple[Array, NDArray[np.int64]]:
    """Images as patches (N, T, D), and a class for each."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1:] != config.image or not len(array):
        raise InputError(f"images have shape {array.shape}; expected (N, {', '.join(map(str, config.image))})")
    if array.dtype.kind != "f":
        raise InputError(f"images have type {array.dtype}; expected floats in [-1, 1]: dequantise 8-bit images first")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array).all((1, 2, 3)))
        raise InputError(f"{len(bad)} of {len(array)} images are not finite, the first at row {bad[0]}")
    return patchify(array, config.patch_size), check_labels(config, labels, len(array))


def check_strength(config: ModelShape, denoise: bool | float | None) -> float | None:
    """The factor on sigma^2, or None for no denoising."""
    if denoise is None:
        return 1.0 if config.noise_std else None
    if denoise is False:
        return None
    if config.noise_std is None:
        raise InputError(
            "this model was trained with uniform dequantisation: there is no Gaussian noise to remove; use --no-denoise"
        )
    if not 0 <= float(denoise) < math.inf:
        raise InputError(f"denoising strength is {denoise}; expected a number of 0 or more, 1 is the theory's")
    return float(denoise)
