"""Noise is a function of (seed, sample), spelled out so exactly that a second writing of it agrees to the bit."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.runtime import noise
from tarflow.runtime.errors import InputError

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]  # its fractional digits
U64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI[:4], (PI[4], PI[5]), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    assert noise.philox4x32(np.array([counter], np.uint32), key)[0].tolist() == words


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def scalar_log(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    if mantissa * 1.4142135623730951 < 1.0:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = s * s, 1.0 / 23
    for n in range(21, 0, -2):
        total = total * square + 1.0 / n
    return exponent * 0.6931471805599453 + (2.0 * s) * total


def scalar_normal(seed: int, sample: int, element: int) -> float:
    """One number of the noise, written from FORMAT.md without numpy."""
    counter = [element // 2, 0, sample & 0xFFFFFFFF, sample >> 32]
    words = scalar_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])
    high, low = words[2 * (element % 2)], words[2 * (element % 2) + 1]
    u = ((high << 20 | low >> 12) + 0.5) * 2.0**-52
    q = u - 0.5

    def ratio(x: float, table: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
        values = []
        for coefficients in table:
            total = coefficients[0]
            for c in coefficients[1:]:
                total = total * x + c
            values.append(total)
        return values[0] / values[1]

    if abs(q) <= 0.425:
        value = q * ratio(0.180625 - q * q, noise._CENTRE)
    else:
        r = math.sqrt(-scalar_log(u if q < 0 else 1.0 - u))
        value = ratio(r - 1.6, noise._NEAR_TAIL) if r <= 5.0 else ratio(r - 5.0, noise._FAR_TAIL)
        value = -value if q < 0 else value
    return float(struct.unpack("f", struct.pack("f", value))[0])


@settings(max_examples=40, deadline=None)
@given(seed=U64, sample=U64)
def test_a_scalar_implementation_of_the_format_agrees_to_the_bit(seed: int, sample: int) -> None:
    found = noise.normal(seed, [sample], (3, 7))[0].ravel()
    assert found.tolist() == [scalar_normal(seed, sample, element) for element in range(21)]


@settings(max_examples=30, deadline=None)
@given(seed=U64, first=st.integers(0, 2**64 - 64), count=st.integers(1, 40), pick=st.integers(0, 39))
def test_noise_i_does_not_depend_on_how_many_are_drawn(seed: int, first: int, count: int, pick: int) -> None:
    pick %= count
    many = noise.normal(seed, range(first, first + count), (5, 3))
    assert np.array_equal(many[pick], noise.normal(seed, [first + pick], (5, 3))[0])


def test_a_sample_larger_than_a_chunk_is_the_same_as_its_parts() -> None:
    large = noise.normal(3, [0, 1], (2 * noise._CHUNK + 3,))
    assert np.array_equal(large[1, :100], noise.normal(3, [1], (100,))[0])
    last = 2 * noise._CHUNK + 2
    assert large[0, last] == np.float32(scalar_normal(3, 0, last))


def test_noise_is_standard_normal_and_seeds_and_streams_differ() -> None:
    x = noise.normal(1, range(500), (2000,)).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.2
    assert not np.array_equal(noise.normal(1, [0], (4,)), noise.normal(2, [0], (4,)))
    assert not np.array_equal(noise.normal(1, [0], (4,)), noise.normal(1, [0], (4,), stream=1))


def test_the_normal_transform_is_accurate_into_its_tails() -> None:
    from scipy.stats import norm

    u = np.concatenate([10.0 ** np.linspace(-15.6, -0.31, 4000), 1 - 10.0 ** np.linspace(-15.6, -0.31, 4000)])
    expected = norm.ppf(u)
    assert np.max(np.abs(noise.normal_quantile(u) - expected) / np.maximum(1, np.abs(expected))) < 1e-14


@pytest.mark.parametrize(("seed", "sample"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_a_seed_or_index_out_of_range_is_refused(seed: int, sample: int) -> None:
    with pytest.raises(InputError, match="expected an integer from 0 to"):
        noise.normal(seed, [sample], (2,))


def test_samples_of_several_seeds_at_once_are_those_of_each_alone() -> None:
    seeds, samples = [0, 2**64 - 1, 7, 7], [5, 2**64 - 1, 3, 0]
    together = noise.normal(seeds, samples, (3, 5))
    for row, seed, sample in zip(together, seeds, samples, strict=True):
        assert np.array_equal(row, noise.normal(seed, [sample], (3, 5))[0])
