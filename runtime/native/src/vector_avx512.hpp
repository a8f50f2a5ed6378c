// Sixteen lanes in one register. With TARFLOW_VNNI, byte products are one instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tarflow::native::TARFLOW_ISA {

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F select_less(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F absolute(F a) { return {_mm512_abs_ps(a.v)}; }
inline F first(F a, int lanes) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << lanes) - 1), a.v)}; }

inline I rounded(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F floats(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I halved(I a) { return {_mm512_srai_epi32(a.v, 1)}; }
inline F power_of_two(I a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(127)), 23))};
}

inline F load(const std::int16_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))))};
}
inline F load(const Bfloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store_bytes(std::int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void store_words(std::int16_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

inline std::int32_t four_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return bytes;
}

#ifdef TARFLOW_VNNI
using Dots = I;
inline void no_dots(Dots& dots) { dots.v = _mm512_setzero_si512(); }
inline void dot4(Dots& dots, const std::uint8_t* weights, const std::int8_t* x) {
  dots.v = _mm512_dpbusd_epi32(dots.v, _mm512_loadu_si512(weights), _mm512_set1_epi32(four_bytes(x)));
}
inline I sums(const Dots& dots) { return dots; }
#else
struct Dots {  // two sums for each output, of eight outputs in each register
  __m512i low, high;
};
inline void no_dots(Dots& dots) { dots.low = dots.high = _mm512_setzero_si512(); }
inline void dot4(Dots& dots, const std::uint8_t* weights, const std::int8_t* x) {
  const __m256i* bytes = reinterpret_cast<const __m256i*>(weights);
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_set1_epi32(four_bytes(x)));
  const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes));
  const __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes + 1));
  dots.low = _mm512_add_epi32(dots.low, _mm512_madd_epi16(low, wide));
  dots.high = _mm512_add_epi32(dots.high, _mm512_madd_epi16(high, wide));
}
inline I sums(const Dots& dots) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_add_epi32(_mm512_permutex2var_epi32(dots.low, even, dots.high),
                           _mm512_permutex2var_epi32(dots.low, odd, dots.high))};
}
#endif

inline I dot2(I total, const std::int8_t* values, const std::int16_t* x) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return {_mm512_add_epi32(total.v, _mm512_madd_epi16(wide, _mm512_set1_epi32(four_bytes(x))))};
}

constexpr std::int32_t kOffset = 128;  // what dot4 adds to a weight: bytes are stored with 128 added, and taken so

constexpr int vectors(std::int64_t) { return 4; }
constexpr int kRows = 6;  // 24 sums, 4 weights
constexpr int byte_vectors(std::int64_t) { return 4; }
constexpr int kByteRows = 3;  // 12 sums of bytes and 12 of floats, 4 weights

}  // namespace tarflow::native::TARFLOW_ISA
