// Philox4x32-10 (Salmon et al., SC 2011) and Wichura's AS 241 (PPND16, 1988) in exact float64 arithmetic.
// This file must be compiled without contraction of a * b + c: the last bit depends on it.
#include "noise.hpp"

#include <array>
#include <cfloat>
#include <cmath>

static_assert(FLT_EVAL_METHOD == 0, "noise needs float64 arithmetic without excess precision (SSE2, not x87)");

namespace tarflow::internal {
namespace {

using Words = std::array<std::uint32_t, 4>;
template <std::size_t N>
using Coefficients = std::array<double, N>;  // highest power first

constexpr Coefficients<8> kCentre[2] = {
    {2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0},
    {5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0}};
constexpr Coefficients<8> kNearTail[2] = {
    {7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0},
    {1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0}};
constexpr Coefficients<8> kFarTail[2] = {
    {2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0},
    {2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0}};
constexpr Coefficients<12> kArtanh = {1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                      1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};

Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t low = std::uint64_t{counter[0]} * 0xD2511F53u;
    const std::uint64_t high = std::uint64_t{counter[2]} * 0xCD9E8D57u;
    counter = {static_cast<std::uint32_t>(high >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(high),
               static_cast<std::uint32_t>(low >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(low)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

template <std::size_t N>
double polynomial(double x, const Coefficients<N>& coefficients) {
  double total = coefficients[0];
  for (std::size_t i = 1; i < N; ++i) total = total * x + coefficients[i];
  return total;
}

double ratio(double x, const Coefficients<8> (&of)[2]) { return polynomial(x, of[0]) / polynomial(x, of[1]); }

// Of exact operations alone: a libm's last bit differs from one machine to the next.
double natural_log(double x) {
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);  // in [0.5, 1)
  if (mantissa * 1.4142135623730951 < 1.0) {
    mantissa *= 2.0;
    --exponent;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  return exponent * 0.6931471805599453 + (2.0 * s) * polynomial(s * s, kArtanh);
}

double inverse_normal(double u) {
  const double q = u - 0.5;
  if (std::fabs(q) <= 0.425) return q * ratio(0.180625 - q * q, kCentre);
  const double r = std::sqrt(-natural_log(q < 0 ? u : 1.0 - u));
  const double value = r <= 5.0 ? ratio(r - 1.6, kNearTail) : ratio(r - 5.0, kFarTail);
  return q < 0 ? -value : value;
}

double unit(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = (std::uint64_t{high} << 20) | (low >> 12);
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

}  // namespace

void normal(std::uint64_t seed, std::uint64_t sample, std::uint32_t stream, std::size_t count, float* out) {
  const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
  for (std::size_t i = 0; i < count; i += 2) {
    const Words words = philox({low(i / 2), stream, low(sample), low(sample >> 32)}, low(seed), low(seed >> 32));
    out[i] = static_cast<float>(inverse_normal(unit(words[0], words[1])));
    if (i + 1 < count) out[i + 1] = static_cast<float>(inverse_normal(unit(words[2], words[3])));
  }
}

}  // namespace tarflow::internal
