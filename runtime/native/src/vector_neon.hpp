// Sixteen lanes in four registers; byte products with the dot product instructions of Armv8.2.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace tarflow::native::TARFLOW_ISA {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};

#define TARFLOW_EACH(type, expression) \
  type out;                            \
  for (int i = 0; i < 4; ++i) out.v[i] = (expression); \
  return out

inline F set(float x) { TARFLOW_EACH(F, vdupq_n_f32(x)); }
inline F load(const float* p) { TARFLOW_EACH(F, vld1q_f32(p + 4 * i)); }
inline void store(float* p, F a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F fma(F a, F b, F c) { TARFLOW_EACH(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline F add(F a, F b) { TARFLOW_EACH(F, vaddq_f32(a.v[i], b.v[i])); }
inline F sub(F a, F b) { TARFLOW_EACH(F, vsubq_f32(a.v[i], b.v[i])); }
inline F mul(F a, F b) { TARFLOW_EACH(F, vmulq_f32(a.v[i], b.v[i])); }
inline F div(F a, F b) { TARFLOW_EACH(F, vdivq_f32(a.v[i], b.v[i])); }
inline F select_less(F a, F b, F yes, F no) {
  TARFLOW_EACH(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
inline F absolute(F a) { TARFLOW_EACH(F, vabsq_f32(a.v[i])); }
inline F first(F a, int lanes) {
  const int32x4_t index = {0, 1, 2, 3};
  TARFLOW_EACH(F, vbslq_f32(vcltq_s32(index, vdupq_n_s32(lanes - 4 * i)), a.v[i], vdupq_n_f32(0)));
}

inline I rounded(F a) { TARFLOW_EACH(I, vcvtnq_s32_f32(a.v[i])); }
inline F floats(I a) { TARFLOW_EACH(F, vcvtq_f32_s32(a.v[i])); }
inline I add(I a, I b) { TARFLOW_EACH(I, vaddq_s32(a.v[i], b.v[i])); }
inline I sub(I a, I b) { TARFLOW_EACH(I, vsubq_s32(a.v[i], b.v[i])); }
inline I set(std::int32_t x) { TARFLOW_EACH(I, vdupq_n_s32(x)); }
inline I halved(I a) { TARFLOW_EACH(I, vshrq_n_s32(a.v[i], 1)); }
inline F power_of_two(I a) {
  TARFLOW_EACH(F, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.v[i], vdupq_n_s32(127)), 23)));
}

inline F load(const std::int16_t* p) { TARFLOW_EACH(F, vcvtq_f32_s32(vmovl_s16(vld1_s16(p + 4 * i)))); }
inline F load(const Bfloat16* p) {
  TARFLOW_EACH(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p[4 * i].bits), 16)));
}
inline void store_words(std::int16_t* p, I a) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(a.v[i]));
}
inline void store_bytes(std::int8_t* p, I a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

using Dots = I;
inline void no_dots(Dots& dots) { dots = set(std::int32_t{0}); }
inline void dot4(Dots& dots, const std::uint8_t* weights, const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) {
    const int8x16_t bytes = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + 16 * i), vdupq_n_u8(0x80)));
    dots.v[i] = vdotq_s32(dots.v[i], bytes, inputs);
  }
}
inline I sums(const Dots& dots) { return dots; }
inline I dot2(I total, const std::int8_t* values, const std::int16_t* x) {
  std::int32_t two;
  std::memcpy(&two, x, 4);
  const int16x8_t pair = vreinterpretq_s16_s32(vdupq_n_s32(two));
  for (int i = 0; i < 4; ++i) {
    const int16x8_t wide = vmovl_s8(vld1_s8(values + 8 * i));
    const int32x4_t low = vmull_s16(vget_low_s16(wide), vget_low_s16(pair)), high = vmull_high_s16(wide, pair);
    total.v[i] = vaddq_s32(total.v[i], vpaddq_s32(low, high));
  }
  return total;
}

#undef TARFLOW_EACH

constexpr std::int32_t kOffset = 0;  // dot4 takes off the 128 that bytes are stored with

constexpr int vectors(std::int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int kRows = 6;  // 24 sums, 4 weights
constexpr int byte_vectors(std::int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int kByteRows = 4;

}  // namespace tarflow::native::TARFLOW_ISA
