// Keys and values of one head: kept slot by slot, read by one query at a time.
#pragma once

#include "elementary.hpp"

namespace tarflow::native::TARFLOW_ISA {

constexpr float kUnseen = -1e30f;  // its exponential is exactly 0

// Softmax of n scores in place, padded to sixteens; returns the sum of what it leaves, whose largest is 1.
inline float exponentials(float* scores, std::int64_t n) {
  const std::int64_t end = padded(n, kLanes);
  for (std::int64_t j = n; j < end; ++j) scores[j] = kUnseen;
  F top = set(kUnseen);
  for (std::int64_t j = 0; j < end; j += kLanes) {
    const F score = load(scores + j);
    top = select_less(top, score, score, top);
  }
  const F most = set(largest(top));
  F sum = set(0.0f);
  for (std::int64_t j = 0; j < end; j += kLanes) {
    const F e = exp(sub(load(scores + j), most));
    store(scores + j, e);
    sum = add(sum, e);
  }
  return total(sum);
}

// V times sixteen slots: their keys' products with the query.
template <int V>
inline void scores_of(const float* keys, std::int64_t head_dim, const float* query, float* scores) {
  F sum[V];
  for (int v = 0; v < V; ++v) sum[v] = set(0.0f);
  for (std::int64_t k = 0; k < head_dim; ++k) {
    const F q = set(query[k]);
    for (int v = 0; v < V; ++v) sum[v] = fma(q, load(keys + (v * head_dim + k) * kLanes), sum[v]);
  }
  for (int v = 0; v < V; ++v) store(scores + v * kLanes, sum[v]);
}

// V times sixteen numbers of a head: values weighed, one slot after the other.
template <int V>
inline void weighed(const float* values, std::int64_t stride, const float* weights, std::int64_t n, F scale, float* out) {
  F sum[V];
  for (int v = 0; v < V; ++v) sum[v] = set(0.0f);
  for (std::int64_t j = 0; j < n; ++j) {
    const F weight = set(weights[j]);
    for (int v = 0; v < V; ++v) sum[v] = fma(weight, load(values + j * stride + v * kLanes), sum[v]);
  }
  for (int v = 0; v < V; ++v) store(out + v * kLanes, mul(sum[v], scale));
}

inline void attend_floats(const Slots& slots, std::int64_t n, std::int64_t head_dim, const float* query, float* out,
                          float* scores) {
  const std::int64_t blocks = padded(n, kLanes) / kLanes, stride = padded(head_dim, kLanes);
  std::int64_t block = 0;
  for (; block + 4 <= blocks; block += 4)
    scores_of<4>(slots.keys + block * head_dim * kLanes, head_dim, query, scores + block * kLanes);
  for (; block < blocks; ++block)
    scores_of<1>(slots.keys + block * head_dim * kLanes, head_dim, query, scores + block * kLanes);
  const F scale = set(1.0f / exponentials(scores, n));
  std::int64_t at = 0;
  for (; at + 64 <= stride; at += 64) weighed<4>(slots.values + at, stride, scores, n, scale, out + at);
  for (; at < stride; at += kLanes) weighed<1>(slots.values + at, stride, scores, n, scale, out + at);
}

// n numbers as whole ones, the largest of them `levels`: returns what one of them is worth, nan if a number is not finite.
inline float scale_of(const float* x, std::int64_t n, float levels, float& inverse) {
  F most = set(0.0f), strange = set(0.0f);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F part = load(x + i);
    const F size = absolute(part);
    most = select_less(most, size, size, most);
    strange = fma(part, set(0.0f), strange);  // 0, or nan
  }
  const float top = largest(most);
  inverse = top > 1e-30f ? levels / top : 0.0f;
  return (top > 1e-30f ? top / levels : 0.0f) + total(strange);
}

inline void keep_bytes(const Slots& slots, std::int64_t slot, std::int64_t head_dim, const float* key,
                       const float* value) {
  float inverse;
  std::uint8_t* bytes = slots.byte_keys + slot / kLanes * padded(head_dim, 4) * kLanes + slot % kLanes * 4;
  slots.key_scales[slot] = scale_of(key, padded(head_dim, kLanes), 127.0f, inverse);
  alignas(64) std::int8_t levels[kLanes];
  for (std::int64_t k = 0; k < head_dim; k += kLanes) {
    store_bytes(levels, rounded(mul(load(key + k), set(inverse))));
    for (std::int64_t i = 0; i < kLanes && k + i < padded(head_dim, 4); ++i)
      bytes[(k + i) / 4 * 4 * kLanes + i % 4] = static_cast<std::uint8_t>(levels[i] + 128);
  }
  slots.value_scales[slot] = scale_of(value, padded(head_dim, kLanes), 127.0f, inverse);
  std::int8_t* values = slots.byte_values + slot / 2 * padded(head_dim, kLanes) * 2 + slot % 2;
  for (std::int64_t k = 0; k < head_dim; k += kLanes) {
    store_bytes(levels, rounded(mul(load(value + k), set(inverse))));
    for (std::int64_t i = 0; i < kLanes; ++i) values[2 * (k + i)] = levels[i];
  }
}

// V times sixteen slots from `slot` on: their keys' products with the query, whose levels sum to `sum`.
template <int V>
inline void byte_scores_of(const Slots& slots, std::int64_t slot, std::int64_t quads, const std::int8_t* query,
                           float query_scale, std::int32_t sum, float* scores) {
  Dots dots[V];
  for (int v = 0; v < V; ++v) no_dots(dots[v]);
  const std::uint8_t* keys = slots.byte_keys + slot * quads * 4;
  for (std::int64_t k = 0; k < quads; ++k)
    for (int v = 0; v < V; ++v) dot4(dots[v], keys + (v * quads + k) * 4 * kLanes, query + 4 * k);
  for (int v = 0; v < V; ++v) {
    const F scale = mul(set(query_scale), load(slots.key_scales + slot + v * kLanes));
    store(scores + slot + v * kLanes, mul(floats(sub(sums(dots[v]), set(kOffset * sum))), scale));
  }
}

// Bytes of the query by bytes of the keys, exactly; then the exponentials, each with its value's scale, as fifteen bits by
// bytes of the values, exactly in every group of slots.
inline void attend_bytes(const Slots& slots, std::int64_t n, std::int64_t head_dim, const float* query, float* out,
                         float* scratch) {
  const std::int64_t end = padded(n, kGroup), quads = padded(head_dim, 4) / 4, stride = padded(head_dim, kLanes);
  float* scores = scratch;
  std::int8_t* levels = reinterpret_cast<std::int8_t*>(scratch + end);  // of the query, then of the exponentials
  float inverse;
  const float query_scale = scale_of(query, stride, 127.0f, inverse);
  std::int32_t sum = 0;
  for (std::int64_t k = 0; k < stride; k += kLanes)
    store_bytes(levels + k, rounded(mul(load(query + k), set(inverse))));
  for (std::int64_t k = 0; k < head_dim; ++k) sum += levels[k];
  std::int64_t slot = 0;
  for (; slot + 4 * kLanes <= n; slot += 4 * kLanes)
    byte_scores_of<4>(slots, slot, quads, levels, query_scale, sum, scores);
  for (; slot < n; slot += kLanes) byte_scores_of<1>(slots, slot, quads, levels, query_scale, sum, scores);
  const F all = set(1.0f / exponentials(scores, n));
  for (std::int64_t j = 0; j < end; j += kLanes)
    store(scores + j, j < n ? mul(load(scores + j), first(load(slots.value_scales + j), n - j < kLanes ? int(n - j) : 16))
                            : set(0.0f));
  for (std::int64_t at = 0; at < stride; at += kLanes) store(out + at, set(0.0f));
  std::int16_t* words = reinterpret_cast<std::int16_t*>(levels);
  for (std::int64_t group = 0; group < n; group += kGroup) {
    const F scale = set(scale_of(scores + group, kGroup, 32767.0f, inverse));
    for (std::int64_t j = 0; j < kGroup; j += kLanes)
      store_words(words + j, rounded(mul(load(scores + group + j), set(inverse))));
    const std::int64_t used = n - group < kGroup ? n - group : kGroup;
    for (std::int64_t at = 0; at < stride; at += kLanes) {
      I exact = set(std::int32_t{0});
      for (std::int64_t j = 0; j < used; j += 2)
        exact = dot2(exact, slots.byte_values + ((group + j) / 2 * stride + at) * 2, words + j);
      store(out + at, fma(floats(exact), scale, load(out + at)));
    }
  }
  for (std::int64_t at = 0; at < stride; at += kLanes) store(out + at, mul(load(out + at), all));
}

}  // namespace tarflow::native::TARFLOW_ISA
