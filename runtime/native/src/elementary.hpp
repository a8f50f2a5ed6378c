// exp and GELU of sixteen lanes, the same to the bit wherever a fused multiply-add and a division are.
// The coefficients come from bench/elementary.py, which derives them and counts what they are off by.
#pragma once

#include "coefficients.hpp"

namespace tarflow::native::TARFLOW_ISA {

// e^x within 1 ulp. 2^n with n the whole number nearest to x / ln 2, times a polynomial in what is left of x; 2^n in two
// factors, so that results below the smallest normal number are rounded once, and those above the largest are infinite.
inline F exp(F x) {
  x = select_less(x, set(-104.0f), set(-104.0f), select_less(set(89.0f), x, set(89.0f), x));
  const I n = rounded(mul(x, set(1.44269504f)));
  F r = fma(floats(n), set(-0.693359375f), x);
  r = fma(floats(n), set(2.12194440e-4f), r);
  F q = set(kExp[4]);
  for (int i = 3; i >= 0; --i) q = fma(q, r, set(kExp[i]));
  const F p = add(fma(mul(r, r), q, r), set(1.0f));
  const I half = halved(n);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

// x Phi(x), Phi the normal distribution: Phi(x) - 1/2 is odd, x times a ratio of polynomials in x^2 up to |x| = 5.5, where
// it is 1/2 to the last bit.
inline F gelu(F x) {
  const F edge = set(5.5f), least = set(-5.5f);
  const F inside = select_less(x, least, least, select_less(edge, x, edge, x));
  const F s = mul(inside, inside);
  F above = set(kGeluAbove[5]), below = set(kGeluBelow[5]);
  for (int i = 4; i >= 0; --i) {
    above = fma(above, s, set(kGeluAbove[i]));
    below = fma(below, s, set(kGeluBelow[i]));
  }
  const F phi = fma(inside, div(above, below), set(0.5f));
  return mul(x, select_less(x, least, set(0.0f), phi));
}

// The sum of sixteen lanes, always in the same order: halves folded upon one another.
inline float total(F x) {
  float lane[16];
  store(lane, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

inline float largest(F x) {
  float lane[16];
  store(lane, x);
  for (int i = 1; i < 16; ++i) lane[0] = lane[0] < lane[i] ? lane[i] : lane[0];
  return lane[0];
}

}  // namespace tarflow::native::TARFLOW_ISA
