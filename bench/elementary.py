"""Derives the polynomials of runtime/native/src/coefficients.hpp, and counts what they are off by.

    python -m bench.elementary

e^x is 2^n e^r with |r| <= ln(2) / 2, and e^r = 1 + r + r^2 q(r). GELU is x Phi(x) with Phi(x) = 1/2 + x f(x^2), and
f(s) = (Phi(sqrt(s)) - 1/2) / sqrt(s) is smooth. q is fitted by a polynomial, f by a ratio of two, so that the largest
relative error of the result is least (Lawson's iteration: least squares whose weights grow where the error is large).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import mpmath as mp  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

HEADER = Path(__file__).parent.parent / "runtime" / "native" / "src" / "coefficients.hpp"
Values = NDArray[np.float64]
Floats = NDArray[np.float32]
EDGE = 5.5  # where Phi is 1 to the last bit of a float32
_POINTS, _ROUNDS = 400, 300


def chebyshev(low: float, high: float) -> Values:
    """Points that lie closer towards both ends."""
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(_POINTS) + 0.5) / _POINTS)


def tabulated(function: Callable[[mp.mpf], mp.mpf], points: Values) -> Values:
    with mp.workdps(40):
        return np.array([float(function(mp.mpf(x))) for x in points])


def fitted(x: Values, y: Values, weight: Values, above: int, below: int = 0) -> tuple[Values, Values, float]:
    """Polynomials p and q of such degrees, lowest power first, q(0) = 1: p / q has the least largest error in y, errors
    weighed. Returns that error too.
    """
    scale = np.abs(x).max()
    u, p_powers, q_powers = x / scale, np.arange(above + 1), np.arange(1, below + 1)
    importance, q = np.ones_like(x), np.ones_like(x)
    for _ in range(_ROUNDS):
        equations = np.concatenate([u[:, None] ** p_powers, -y[:, None] * u[:, None] ** q_powers], 1)
        each = np.sqrt(importance) * weight / np.abs(q)
        solved, *_ = np.linalg.lstsq(equations * each[:, None], y * each, rcond=None)
        p, q = u[:, None] ** p_powers @ solved[: above + 1], 1 + u[:, None] ** q_powers @ solved[above + 1 :]
        error = np.abs(p / q - y) * weight
        importance *= error / error.max() + 1e-3
        importance /= importance.mean()
    return solved[: above + 1] / scale**p_powers, np.r_[1, solved[above + 1 :] / scale**q_powers], float(error.max())


def exponential() -> tuple[Values, float]:
    r = chebyshev(-1.0002 * math.log(2) / 2, 1.0002 * math.log(2) / 2)
    q = tabulated(lambda x: (mp.exp(x) - 1 - x) / x**2, r)
    coefficients, _, error = fitted(r, q, r**2 / np.exp(r), 4)
    return coefficients, error


def normal() -> tuple[Values, Values, float]:
    s = chebyshev(1e-9, EDGE**2)
    f = tabulated(lambda x: (mp.ncdf(mp.sqrt(x)) - mp.mpf(1) / 2) / mp.sqrt(x), s)
    return fitted(s, f, 1 / np.abs(f), 5, 5)


def in_header(name: str) -> Floats:
    """The coefficients that the library is built with."""
    found = re.search(rf"{name}\[\d\] = {{(.*?)}}", HEADER.read_text(), re.DOTALL)
    assert found is not None
    return np.array([word.strip().rstrip("f") for word in found[1].split(",")], np.float32)


def exp_in_float32(x: Floats) -> Floats:
    """As elementary.hpp computes it: each line one operation that rounds once."""
    q = in_header("kExp")
    n = np.rint(x * np.float32(1.44269504))
    r = fma(n, np.float32(2.12194440e-4), fma(n, np.float32(-0.693359375), x))
    total = np.full_like(r, q[4])
    for coefficient in q[3::-1]:
        total = fma(total, r, coefficient)
    e_to_r: Floats = fma(r * r, total, r) + np.float32(1)
    scaled: Floats = np.ldexp(e_to_r, n.astype(int))
    return scaled


def gelu_in_float32(x: Floats) -> Floats:
    above, below = in_header("kGeluAbove"), in_header("kGeluBelow")
    s = x * x
    ratio = [np.full_like(x, part[5]) for part in (above, below)]
    for i in range(4, -1, -1):
        ratio = [fma(one, s, part[i]) for one, part in zip(ratio, (above, below), strict=True)]
    return x * fma(x, ratio[0] / ratio[1], np.float32(0.5))


def fma(a: Floats, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a b + c of float32, in one rounding but for ties that float64 makes of what is close to one."""
    exact: Values = a.astype(np.float64) * b + c
    return exact.astype(np.float32)


def errors() -> tuple[float, float]:
    """The largest error of e^x in units of its last place, and of GELU in units of x's."""
    x = np.linspace(-87, 88, 2_000_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    of_exp = np.abs(exp_in_float32(x) - exact) / np.spacing(exact.astype(np.float32))
    x = np.linspace(-EDGE, EDGE, 200_001).astype(np.float32)
    exact = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.astype(np.float64)])
    of_gelu = np.abs(gelu_in_float32(x) - exact) / np.spacing(np.abs(x))
    return float(of_exp.max()), float(of_gelu.max())


def as_source(name: str, coefficients: Values) -> str:
    """A line of coefficients.hpp."""
    numbers = (f"{value:.9g}" for value in coefficients.astype(np.float32))
    words = ", ".join(f"{word if '.' in word or 'e' in word else word + '.0'}f" for word in numbers)
    return f"constexpr float {name}[{len(coefficients)}] = {{{words}}};"


def main() -> None:
    q, error = exponential()
    above, below, ratio_error = normal()
    print(as_source("kExp", q), f"// e^r is off by {error:.1e} of itself before rounding", sep="  ")
    print(as_source("kGeluAbove", above))
    print(as_source("kGeluBelow", below), f"// f is off by {ratio_error:.1e} of itself before rounding", sep="  ")
    print("e^x is off by {:.2f} units of its last place at most, GELU by {:.2f} of x's".format(*errors()))


if __name__ == "__main__":
    main()
