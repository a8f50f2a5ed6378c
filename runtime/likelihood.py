"""Images on their way to a likelihood, and a likelihood's units: bits per dimension, nats."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from . import noise
from .backend import Array
from .bundle import ModelShape
from .errors import InputError
from .inputs import as_array


def bits_of(latent: Array, log_det: Array) -> Array:
    """Bits per dimension (N,), of latents (N, T, D) and log-determinants (N,) in nats per dimension."""
    energy = 0.5 * np.square(latent, dtype=np.float64).mean((1, 2)) + 0.5 * math.log(2 * math.pi) + math.log(128)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and whoever asks must see that
        return np.asarray((energy - log_det) / math.log(2), np.float32)


def nats_of(bits: Array, dimensions: int) -> Array:
    """Log-likelihoods in nats, (N,), of images of so many dimensions, from their bits per dimension."""
    with np.errstate(over="ignore"):
        return ((math.log(128) - bits.astype(np.float64) * math.log(2)) * dimensions).astype(np.float32)


def dequantised(config: ModelShape, images: ArrayLike, seed: int, first_sample: int) -> Array:
    """8-bit images (N, channels, size, size) -> continuous ones, in [-1, 1] units; see ``Flow.dequantise``."""
    array = as_array(images, "images")
    if array.dtype != np.uint8 or array.shape[1:] != config.image or array.ndim != 4 or not len(array):
        shape = ", ".join(map(str, config.image))
        raise InputError.of("images", f"{array.dtype} of shape {array.shape}", f"uint8 (N, {shape})")
    noise.check(seed, (first_sample,))
    indices = range(first_sample, first_sample + len(array))
    if config.noise_std is None:
        u = noise.uniform(seed, indices, array[0].size, noise.DEQUANTISATION).reshape(array.shape)
        return (2 * (array + u) / 256 - 1).astype(np.float32)
    added = noise.normal(seed, indices, config.image, noise.DEQUANTISATION)
    return (array / np.float32(127.5) - 1 + config.noise_std * added).astype(np.float32)
