// Sixteen lanes in two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tarflow::native::TARFLOW_ISA {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F select_less(F x, F y, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline F absolute(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F first(F x, int lanes) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), index);
  const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes - 8), index);
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(low)), _mm256_and_ps(x.b, _mm256_castsi256_ps(high))};
}

inline I rounded(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I set(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I halved(I x) { return {_mm256_srai_epi32(x.a, 1), _mm256_srai_epi32(x.b, 1)}; }
inline F power_of_two(I x) {
  const I biased = add(x, set(std::int32_t{127}));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased.a, 23)), _mm256_castsi256_ps(_mm256_slli_epi32(biased.b, 23))};
}

inline __m128i sixteen_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F load(const std::int16_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sixteen_bytes(p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sixteen_bytes(p + 8)))};
}
inline F load(const Bfloat16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen_bytes(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen_bytes(p + 8)), 16))};
}
inline __m256i words_of(I x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8); }
inline void store_words(std::int16_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words_of(x)); }
inline void store_bytes(std::int8_t* p, I x) {
  const __m256i words = words_of(x);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline std::int32_t four_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return bytes;
}

struct Dots {  // two sums for each output, of four outputs in each register
  __m256i part[4];
};
inline void no_dots(Dots& dots) {
  for (__m256i& part : dots.part) part = _mm256_setzero_si256();
}
inline void dot4(Dots& dots, const std::uint8_t* weights, const std::int8_t* x) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_set1_epi32(four_bytes(x)));
  for (int i = 0; i < 4; ++i) {
    const __m256i four = _mm256_cvtepu8_epi16(sixteen_bytes(weights + 16 * i));
    dots.part[i] = _mm256_add_epi32(dots.part[i], _mm256_madd_epi16(four, wide));
  }
}
inline I sums(const Dots& dots) {  // hadd takes halves of registers by turns
  const __m256i low = _mm256_hadd_epi32(dots.part[0], dots.part[1]), high = _mm256_hadd_epi32(dots.part[2], dots.part[3]);
  return {_mm256_permute4x64_epi64(low, 0xD8), _mm256_permute4x64_epi64(high, 0xD8)};
}
inline I dot2(I total, const std::int8_t* values, const std::int16_t* x) {
  const __m256i pair = _mm256_set1_epi32(four_bytes(x));
  const __m256i low = _mm256_cvtepi8_epi16(sixteen_bytes(values)), high = _mm256_cvtepi8_epi16(sixteen_bytes(values + 16));
  return {_mm256_add_epi32(total.a, _mm256_madd_epi16(low, pair)), _mm256_add_epi32(total.b, _mm256_madd_epi16(high, pair))};
}

constexpr std::int32_t kOffset = 128;  // what dot4 adds to a weight: bytes are stored with 128 added, and taken so

constexpr int vectors(std::int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int kRows = 6;  // 12 sums, 2 weights, 1 input
constexpr int byte_vectors(std::int64_t rows) { return rows == 1 ? 2 : 1; }
constexpr int kByteRows = 2;

}  // namespace tarflow::native::TARFLOW_ISA
