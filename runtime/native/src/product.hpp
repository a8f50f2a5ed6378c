// Products: tiles of a few rows by sixteen to sixty-four outputs. Each output adds its inputs one after the other, each by
// a fused multiply-add, so its bits do not depend on the tile it is computed in.
#pragma once

#include "elementary.hpp"

namespace tarflow::native::TARFLOW_ISA {

// Where several rows are multiplied, all of them pass so many inputs before the next: their weights are still near then.
constexpr std::int64_t kNear = 64;        // 16 KiB of floats
constexpr std::int64_t kNearBytes = 256;

// Weights that are asked for before they are needed, a share of them in each pass over those at hand: memory and
// multipliers are busy at once. A single pass asks for none: it reads in sequence, as processors expect it.
struct Ahead {
  static constexpr std::int64_t kLead = 3;  // times as far behind those at hand: soon enough

  const char* from;
  std::int64_t step, share;  // bytes with each input, and with all of a pass

  // For passes over `count` inputs of `bytes` each, which end before `behind`.
  Ahead(const void* behind, std::int64_t bytes, std::int64_t count, std::int64_t passes)
      : from(static_cast<const char*>(behind) + kLead * count * bytes),
        step(passes > 1 ? bytes / passes : 0),
        share(step * count) {}

  void fetch(std::int64_t pass, std::int64_t k) const {
    for (std::int64_t at = 0; at < step; at += 64) __builtin_prefetch(from + pass * share + k * step + at, 0, 2);
  }
};

// How tiles of `most` rows read weights that some rows are multiplied by.
struct Passes {
  std::int64_t tiles, each, all;  // each: of a tile that is full

  Passes(std::int64_t rows, std::int64_t most, int (*vectors_of)(std::int64_t))
      : tiles((rows + most - 1) / most), each(kPanel / kLanes / vectors_of(most)), all(rows / most * each) {
    if (rows % most != 0) all += kPanel / kLanes / vectors_of(rows % most);
  }
};

// R rows by V times sixteen outputs: products of inputs start ... stop - 1, added to `sum`.
template <int R, int V, class T>
inline void add_products(const float* x, std::int64_t stride, const T* weights, std::int64_t start, std::int64_t stop,
                         const Ahead& ahead, std::int64_t pass, F (&sum)[R][V]) {
  for (std::int64_t k = start; k < stop; ++k) {
    ahead.fetch(pass, k);
    F w[V];
    for (int v = 0; v < V; ++v) w[v] = load(weights + k * kPanel + v * kLanes);
    TARFLOW_UNROLLED for (int r = 0; r < R; ++r) {
      const F input = set(x[r * stride + k]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(input, w[v], sum[r][v]);
    }
  }
}

// R rows by V times sixteen outputs, over `inputs` of K, upon what `out` holds (nothing if `begin`). Weights that are
// Scaled are summed by group, and each sum is multiplied by its scale.
template <int R, int V, bool Scaled, class T>
inline void tile(const float* x, std::int64_t stride, const T* weights, std::int64_t inputs, const float* scales,
                 float* out, bool begin, const Ahead& ahead, std::int64_t pass) {
  F sum[R][V];
  TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = begin ? set(0.0f) : load(out + r * kPanel + v * kLanes);
  if constexpr (!Scaled) add_products<R, V>(x, stride, weights, 0, inputs, ahead, pass, sum);
  for (std::int64_t start = 0; Scaled && start < inputs; start += kGroup) {
    F part[R][V];
    TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) part[r][v] = set(0.0f);
    add_products<R, V>(x, stride, weights, start, start + kGroup < inputs ? start + kGroup : inputs, ahead, pass,
                       part);
    for (int v = 0; v < V; ++v) {
      const F scale = load(scales + start + v * kLanes);
      TARFLOW_UNROLLED for (int r = 0; r < R; ++r) sum[r][v] = fma(part[r][v], scale, sum[r][v]);
    }
  }
  TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * kPanel + v * kLanes, sum[r][v]);
}

// As many rows as R or fewer.
template <int R, bool Scaled, class T>
inline void last_rows(std::int64_t rows, const float* x, std::int64_t stride, const T* weights, std::int64_t inputs,
                      const float* scales, float* out, bool begin, const Ahead& ahead, std::int64_t pass) {
  if (rows == R) {
    constexpr int V = vectors(R);
    for (int v = 0; v < kPanel / kLanes; v += V)
      tile<R, V, Scaled>(x, stride, weights + v * kLanes, inputs, scales + v * kLanes, out + v * kLanes, begin,
                         ahead, pass + v / V);
  } else if constexpr (R > 1) {
    last_rows<R - 1, Scaled>(rows, x, stride, weights, inputs, scales, out, begin, ahead, pass);
  }
}

template <bool Scaled, class T>
inline void multiply_numbers(const T* weights, const float* scales, const Rows& rows, std::int64_t inputs, float* out) {
  const Passes passes(rows.count, kRows, vectors);
  const std::int64_t most = passes.all == 1 ? inputs : kNear;
  for (std::int64_t start = 0; start < inputs; start += most) {
    const std::int64_t count = inputs - start < most ? inputs - start : most;
    const T* here = weights + start * kPanel;
    const Ahead ahead(here + count * kPanel, kPanel * sizeof(T), count, passes.all);
    for (std::int64_t i = 0; i < passes.tiles; ++i) {
      const std::int64_t row = i * kRows, some = rows.count - row < kRows ? rows.count - row : kRows;
      last_rows<kRows, Scaled>(some, rows.x + row * rows.stride + start, rows.stride, here, count,
                               scales + (Scaled ? start : 0), out + row * kPanel, start == 0, ahead, i * passes.each);
    }
  }
}

// R rows of bytes by V times sixteen outputs, upon what `out` holds (nothing if `first` is 0), some groups from `first`
// on. A group's products are added exactly, then scaled.
template <int R, int V>
inline void tile_of_bytes(const Rows& rows, std::int64_t row, const std::uint8_t* weights, std::int64_t first,
                          std::int64_t groups, const float* scales, float* out, const Ahead& ahead,
                          std::int64_t pass) {
  const std::int64_t stride = rows.stride / kGroup;
  F sum[R][V];
  TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = first == 0 ? set(0.0f) : load(out + (row + r) * kPanel + v * kLanes);
  for (std::int64_t g = first; g < first + groups; ++g) {
    Dots dots[R][V];
    TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) no_dots(dots[r][v]);
    const std::int8_t* levels = rows.levels + row * rows.stride + g * kGroup;
    for (std::int64_t k = 0; k < kGroup; k += 4, weights += 4 * kPanel) {
      ahead.fetch(pass, ((g - first) * kGroup + k) / 4);
      for (int v = 0; v < V; ++v)
        TARFLOW_UNROLLED for (int r = 0; r < R; ++r) dot4(dots[r][v], weights + 4 * kLanes * v, levels + r * rows.stride + k);
    }
    TARFLOW_UNROLLED for (int r = 0; r < R; ++r) {
      const std::int64_t at = (row + r) * stride + g;
      const F scale = set(rows.scales[at]);
      const I offset = set(kOffset * rows.sums[at]);
      for (int v = 0; v < V; ++v) {
        const F both = mul(scale, load(scales + g * kPanel + v * kLanes));
        sum[r][v] = fma(floats(sub(sums(dots[r][v]), offset)), both, sum[r][v]);
      }
    }
  }
  TARFLOW_UNROLLED for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + (row + r) * kPanel + v * kLanes, sum[r][v]);
}

template <int R>
inline void last_rows_of_bytes(std::int64_t count, const Rows& rows, std::int64_t row, const std::uint8_t* weights,
                               std::int64_t first, std::int64_t groups, const float* scales, float* out,
                               const Ahead& ahead, std::int64_t pass) {
  if (count == R) {
    constexpr int V = byte_vectors(R);
    for (int v = 0; v < kPanel / kLanes; v += V)
      tile_of_bytes<R, V>(rows, row, weights + 4 * kLanes * v, first, groups, scales + v * kLanes, out + v * kLanes,
                          ahead, pass + v / V);
  } else if constexpr (R > 1) {
    last_rows_of_bytes<R - 1>(count, rows, row, weights, first, groups, scales, out, ahead, pass);
  }
}

inline void multiply_bytes(const std::uint8_t* weights, const float* scales, const Rows& rows, std::int64_t groups,
                           float* out) {
  const Passes passes(rows.count, kByteRows, byte_vectors);
  const std::int64_t most = passes.all == 1 ? groups : kNearBytes / kGroup;
  for (std::int64_t first = 0; first < groups; first += most) {
    const std::int64_t count = groups - first < most ? groups - first : most;
    const std::uint8_t* here = weights + first * kGroup * kPanel;
    const Ahead ahead(here + count * kGroup * kPanel, 4 * kPanel, count * kGroup / 4, passes.all);
    for (std::int64_t i = 0; i < passes.tiles; ++i) {
      const std::int64_t row = i * kByteRows, some = rows.count - row < kByteRows ? rows.count - row : kByteRows;
      last_rows_of_bytes<kByteRows>(some, rows, row, here, first, count, scales, out, ahead, i * passes.each);
    }
  }
}

inline void multiply(const Panels& all, std::int64_t panel, const Rows& rows, float* out) {
  const std::uint8_t* weights = all.weights + panel * all.stride;
  const std::int64_t groups = groups_of(all.inputs);
  const float* scales = all.scales == nullptr ? all.bias : all.scales + panel * groups * kPanel;  // or never read
  if (all.precision == Precision::fp32)
    multiply_numbers<false>(reinterpret_cast<const float*>(weights), scales, rows, all.inputs, out);
  else if (all.precision == Precision::int16)
    multiply_numbers<true>(reinterpret_cast<const std::int16_t*>(weights), scales, rows, all.inputs, out);
  else if (all.precision == Precision::bf16)
    multiply_numbers<false>(reinterpret_cast<const Bfloat16*>(weights), scales, rows, all.inputs, out);
  else
    multiply_bytes(weights, scales, rows, groups, out);
  for (int v = 0; v < kPanel; v += kLanes) {
    const F bias = load(all.bias + panel * kPanel + v);
    for (std::int64_t r = 0; r < rows.count; ++r)
      store(out + r * kPanel + v, add(load(out + r * kPanel + v), bias));
  }
}

}  // namespace tarflow::native::TARFLOW_ISA
