"""Noise that is a function of (seed, sample): Philox4x32-10 and a normal transform of exact arithmetic.

Normative text: FORMAT.md, "Noise". Only additions, multiplications, divisions and square roots of float64 are used,
all rounded as IEEE 754 demands, so any language that does not fuse them reproduces every bit. Philox: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Inverse normal: Wichura, algorithm AS 241 (PPND16), 1988.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .fields import check_field, told

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_CHUNK = 1 << 16  # Philox blocks computed at once: temporaries stay in cache

Seeds = int | Sequence[int]  # one for all samples, or one each
SAMPLING = 0  # streams: the counter's second word
DEQUANTISATION = 0x80000000

# AS 241: numerators and denominators, highest power first.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_NEAR_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip
_LOG_SERIES = tuple(1.0 / n for n in range(23, 0, -2))  # of artanh, highest power first
_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int] | NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox on counters (N, 4) -> random words (N, 4). ``key`` is two words, or (N, 2) of them."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = np.asarray(key, np.uint64).T
    for _ in range(10):
        low_product, high_product = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (high_product >> _SHIFT) ^ c1 ^ k0, (low_product >> _SHIFT) ^ c3 ^ k1
        c1, c3 = high_product & _WORD, low_product & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3], 1).astype(np.uint32)


def uniform(seed: Seeds, samples: Iterable[int], count: int, stream: int = SAMPLING) -> NDArray[np.float64]:
    """``count`` numbers in (0, 1) for each sample: (len(samples), count), each an odd multiple of 2^-53."""
    if not hasattr(samples, "__iter__"):
        raise InputError.of("samples", told(samples), "a list of integers")
    given: Any = seed
    seeds = [given] if isinstance(given, str) or not hasattr(given, "__iter__") else given
    indices = np.array([_words(sample, "first_sample") for sample in samples], np.uint32).reshape(-1, 2)
    keys = np.array([_words(one, "seed") for one in seeds], np.uint32).reshape(-1, 2)
    blocks = (count + 1) // 2  # of four words: two numbers
    out = np.empty((len(indices), 2 * blocks), np.float64)
    rows, columns = max(1, _CHUNK // max(blocks, 1)), min(blocks, _CHUNK)
    for row in range(0, len(indices), rows):
        for column in range(0, blocks, columns):
            number = np.arange(column, min(column + columns, blocks), dtype=np.uint32)
            sample = indices[row : row + rows]
            counter = np.empty((len(sample), len(number), 4), np.uint32)
            counter[..., 0], counter[..., 1] = number, stream
            counter[..., 2], counter[..., 3] = sample[:, :1], sample[:, 1:]
            key = keys[0] if len(keys) == 1 else keys[row : row + rows].repeat(len(number), 0)
            words = philox4x32(counter.reshape(-1, 4), key).astype(np.uint64).reshape(len(sample), -1, 2)
            bits = (words[..., 0] << np.uint64(20)) | (words[..., 1] >> np.uint64(12))  # 52 of 64
            out[row : row + rows, 2 * column : 2 * (column + len(number))] = (bits.astype(np.float64) + 0.5) * 2.0**-52
    return out[:, :count]


def normal(seed: Seeds, samples: Iterable[int], shape: Sequence[int], stream: int = SAMPLING) -> NDArray[np.float32]:
    """Standard normal noise, one row of ``shape`` for each sample index: (len(samples), *shape) float32.

    A row depends on its seed, ``stream`` and its sample index alone.
    Seeds and indices are integers in [0, 2^64).
    Raises InputError for a seed or index outside that range.
    """
    numbers = uniform(seed, samples, int(np.prod(shape)), stream)
    noise = np.empty(numbers.shape, np.float32)
    rows = max(1, 2 * _CHUNK // max(numbers.shape[1], 1))
    for row in range(0, len(numbers), rows):  # a few rows at a time: small float64 temporaries
        noise[row : row + rows] = normal_quantile(numbers[row : row + rows])
    return noise.reshape(len(numbers), *shape)


def check(seed: int, samples: Iterable[int]) -> None:
    """Raise InputError for a seed or sample index there is no noise for."""
    _words(seed, "seed")
    for sample in samples:
        _words(sample, "first_sample")


def _words(value: int, what: str) -> tuple[int, int]:
    check_field(what, value, "an integer")
    value = int(value)
    if not 0 <= value < 2**64:
        raise InputError.of(what, value, "an integer from 0 to 2^64 - 1")
    return value & 0xFFFFFFFF, value >> 32


def _ratio(x: NDArray[np.float64], coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.float64]:
    return _polynomial(x, coefficients[0]) / _polynomial(x, coefficients[1])


def _polynomial(x: NDArray[np.float64], coefficients: tuple[float, ...]) -> NDArray[np.float64]:
    """Horner's rule, coefficients from the highest power down."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm from exact operations alone: a libm's last bit differs from one machine to the next."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa * _SQRT2 < 1.0
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = np.where(small, exponent - 1, exponent).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LN2 + (2.0 * s) * _polynomial(s * s, _LOG_SERIES)


def normal_quantile(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard normal quantile of u in (0, 1)."""
    q = u - 0.5
    out = q * _ratio(0.180625 - q * q, _CENTRE)
    tail = np.abs(q) > 0.425
    p = np.where(q[tail] < 0, u[tail], 1.0 - u[tail])
    r = np.sqrt(-_log(p))
    value = np.where(r <= 5.0, _ratio(r - 1.6, _NEAR_TAIL), _ratio(r - 5.0, _FAR_TAIL))
    out[tail] = np.where(q[tail] < 0, -value, value)
    return out
