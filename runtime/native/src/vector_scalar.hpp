// Sixteen lanes without any instruction set: what the others must agree with to the bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tarflow::native::TARFLOW_ISA {

struct F {
  float lane[16];
};
struct I {
  std::int32_t lane[16];
};

#define TARFLOW_EACH(expression) \
  F out;                         \
  for (int i = 0; i < 16; ++i) out.lane[i] = (expression); \
  return out
#define TARFLOW_EACH_INTEGER(expression) \
  I out;                                 \
  for (int i = 0; i < 16; ++i) out.lane[i] = (expression); \
  return out

inline F set(float x) { TARFLOW_EACH(x); }
inline F load(const float* p) { TARFLOW_EACH(p[i]); }
inline void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline F fma(F a, F b, F c) { TARFLOW_EACH(std::fma(a.lane[i], b.lane[i], c.lane[i])); }  // one rounding, also in software
inline F add(F a, F b) { TARFLOW_EACH(a.lane[i] + b.lane[i]); }
inline F sub(F a, F b) { TARFLOW_EACH(a.lane[i] - b.lane[i]); }
inline F mul(F a, F b) { TARFLOW_EACH(a.lane[i] * b.lane[i]); }
inline F div(F a, F b) { TARFLOW_EACH(a.lane[i] / b.lane[i]); }
inline F select_less(F a, F b, F yes, F no) { TARFLOW_EACH(a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]); }
inline F absolute(F a) { TARFLOW_EACH(std::fabs(a.lane[i])); }
inline F first(F a, int lanes) { TARFLOW_EACH(i < lanes ? a.lane[i] : 0.0f); }

// What no integer is near becomes 0.
inline std::int32_t nearest(float x) {
  return std::fabs(x) < 0x1p31f ? static_cast<std::int32_t>(std::nearbyint(x)) : 0;
}
inline I rounded(F a) { TARFLOW_EACH_INTEGER(nearest(a.lane[i])); }
inline F floats(I a) { TARFLOW_EACH(static_cast<float>(a.lane[i])); }
inline I add(I a, I b) { TARFLOW_EACH_INTEGER(a.lane[i] + b.lane[i]); }
inline I sub(I a, I b) { TARFLOW_EACH_INTEGER(a.lane[i] - b.lane[i]); }
inline I set(std::int32_t x) { TARFLOW_EACH_INTEGER(x); }
inline I halved(I a) { TARFLOW_EACH_INTEGER(a.lane[i] >> 1); }
inline F power_of_two(I a) {
  F out;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(a.lane[i] + 127) << 23;
    std::memcpy(&out.lane[i], &bits, 4);
  }
  return out;
}

inline F load(const std::int16_t* p) { TARFLOW_EACH(static_cast<float>(p[i])); }
inline F load(const Bfloat16* p) {
  F out;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p[i].bits) << 16;
    std::memcpy(&out.lane[i], &bits, 4);
  }
  return out;
}
inline void store_bytes(std::int8_t* p, I a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.lane[i]);
}
inline void store_words(std::int16_t* p, I a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(a.lane[i]);
}

using Dots = I;
inline void no_dots(Dots& dots) { dots = set(std::int32_t{0}); }
inline void dot4(Dots& dots, const std::uint8_t* weights, const std::int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) dots.lane[i] += std::int32_t{weights[4 * i + j]} * x[j];
}
inline I sums(const Dots& dots) { return dots; }
inline I dot2(I total, const std::int8_t* values, const std::int16_t* x) {
  for (int i = 0; i < 16; ++i) total.lane[i] += values[2 * i] * x[0] + values[2 * i + 1] * x[1];
  return total;
}

#undef TARFLOW_EACH
#undef TARFLOW_EACH_INTEGER

constexpr std::int32_t kOffset = 128;  // what dot4 adds to a weight: bytes are stored with 128 added, and taken so

constexpr int vectors(std::int64_t) { return 4; }  // of sixteen outputs that R rows are multiplied by at once
constexpr int kRows = 1;     // of a tile
constexpr int byte_vectors(std::int64_t) { return 4; }
constexpr int kByteRows = 1;

}  // namespace tarflow::native::TARFLOW_ISA
