// Products: tiles of a few rows by sixteen to sixty-four outputs. Each output adds its inputs one after the other, each by
// a fused multiply-add, so its bits do not depend on the tile it is computed in.
#pragma once

#include "elementary.hpp"

namespace tarflow::native::TARFLOW_ISA {

// R rows by V times sixteen outputs, over `inputs` of K, upon what `out` holds (nothing if `begin`). Weights that are
// Scaled are summed by group, and each sum is multiplied by its scale.
template <int R, int V, bool Scaled, class T>
inline void tile(const float* x, std::int64_t stride, const T* weights, std::int64_t inputs, const float* scales,
                 float* out, bool begin) {
  F sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = begin ? set(0.0f) : load(out + r * kPanel + v * kLanes);
  for (std::int64_t start = 0; start < inputs; start += kGroup) {
    const std::int64_t stop = Scaled && start + kGroup < inputs ? start + kGroup : inputs;
    F part[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) part[r][v] = Scaled ? set(0.0f) : sum[r][v];
    for (std::int64_t k = start; k < stop; ++k) {
      F w[V];
      for (int v = 0; v < V; ++v) w[v] = load(weights + k * kPanel + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const F input = set(x[r * stride + k]);
        for (int v = 0; v < V; ++v) part[r][v] = fma(input, w[v], part[r][v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      const F scale = Scaled ? load(scales + start + v * kLanes) : set(1.0f);
      for (int r = 0; r < R; ++r) sum[r][v] = Scaled ? fma(part[r][v], scale, sum[r][v]) : part[r][v];
    }
    if (!Scaled) break;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * kPanel + v * kLanes, sum[r][v]);
}

template <int R, bool Scaled, class T>
inline void rows_of_tile(const float* x, std::int64_t stride, const T* weights, std::int64_t inputs,
                         const float* scales, float* out, bool begin) {
  constexpr int V = kVectors<R>;
  for (int v = 0; v < kPanel / kLanes; v += V)
    tile<R, V, Scaled>(x, stride, weights + v * kLanes, inputs, scales + v * kLanes, out + v * kLanes, begin);
}

// As many rows as R or fewer.
template <int R, bool Scaled, class T>
inline void last_rows(std::int64_t rows, const float* x, std::int64_t stride, const T* weights, std::int64_t inputs,
                      const float* scales, float* out, bool begin) {
  if (rows == R) {
    rows_of_tile<R, Scaled>(x, stride, weights, inputs, scales, out, begin);
  } else if constexpr (R > 1) {
    last_rows<R - 1, Scaled>(rows, x, stride, weights, inputs, scales, out, begin);
  }
}

template <bool Scaled, class T>
inline void all_rows(const Rows& rows, std::int64_t start, const T* weights, std::int64_t inputs, const float* scales,
                     float* out) {
  for (std::int64_t r = 0; r < rows.count; r += kRows) {
    const std::int64_t count = rows.count - r < kRows ? rows.count - r : kRows;
    last_rows<kRows, Scaled>(count, rows.x + r * rows.stride + start, rows.stride, weights, inputs, scales,
                             out + r * kPanel, start == 0);
  }
}

// Weights that are floats, some inputs at a time, so that those of a panel stay near while all rows pass.
inline void multiply_floats(const float* weights, const Rows& rows, std::int64_t inputs, float* out) {
  constexpr std::int64_t kNear = 512;
  const std::int64_t most = rows.count > kRows ? kNear : inputs;
  for (std::int64_t start = 0; start < inputs; start += most) {
    const std::int64_t count = inputs - start < most ? inputs - start : most;
    all_rows<false>(rows, start, weights + start * kPanel, count, weights, out);
  }
}

// Weights of sixteen bits: for few rows as they are, for more of them unpacked once.
template <bool Scaled, class T>
inline void multiply_narrow(const T* weights, const float* scales, const Rows& rows, std::int64_t inputs, float* out,
                            float* scratch) {
  if (rows.count <= 2) return all_rows<Scaled>(rows, 0, weights, inputs, scales, out);
  constexpr std::int64_t kMost = kUnpacked / kPanel;
  for (std::int64_t start = 0; start < inputs; start += kMost) {
    const std::int64_t count = inputs - start < kMost ? inputs - start : kMost;
    for (std::int64_t i = 0; i < count * kPanel; i += kLanes) store(scratch + i, load(weights + start * kPanel + i));
    all_rows<Scaled>(rows, start, scratch, count, Scaled ? scales + start : scales, out);
  }
}

// R rows of bytes by V times sixteen outputs. A group's products are added exactly, then scaled.
template <int R, int V>
inline void tile_of_bytes(const Rows& rows, std::int64_t row, const std::uint8_t* weights, std::int64_t groups,
                          const float* scales, float* out) {
  F sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = set(0.0f);
  for (std::int64_t g = 0; g < groups; ++g) {
    Dots dots[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) no_dots(dots[r][v]);
    const std::int8_t* levels = rows.levels + (row * groups + g) * kGroup;
    for (std::int64_t k = 0; k < kGroup; k += 4, weights += 4 * kPanel)
      for (int v = 0; v < V; ++v)
        for (int r = 0; r < R; ++r) dot4(dots[r][v], weights + 4 * kLanes * v, levels + r * groups * kGroup + k);
    for (int r = 0; r < R; ++r) {
      const std::int64_t at = (row + r) * groups + g;
      const F scale = set(rows.scales[at]);
      const I offset = set(kOffset * rows.sums[at]);
      for (int v = 0; v < V; ++v) {
        const F both = mul(scale, load(scales + g * kPanel + v * kLanes));
        sum[r][v] = fma(floats(sub(sums(dots[r][v]), offset)), both, sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + (row + r) * kPanel + v * kLanes, sum[r][v]);
}

template <int R>
inline void last_rows_of_bytes(std::int64_t count, const Rows& rows, std::int64_t row, const std::uint8_t* weights,
                               std::int64_t groups, const float* scales, float* out) {
  if (count == R) {
    constexpr int V = kByteVectors<R>;
    for (int v = 0; v < kPanel / kLanes; v += V)
      tile_of_bytes<R, V>(rows, row, weights + 4 * kLanes * v, groups, scales + v * kLanes, out + v * kLanes);
  } else if constexpr (R > 1) {
    last_rows_of_bytes<R - 1>(count, rows, row, weights, groups, scales, out);
  }
}

inline void multiply_bytes(const std::uint8_t* weights, const float* scales, const Rows& rows, std::int64_t groups,
                           float* out) {
  for (std::int64_t r = 0; r < rows.count; r += kByteRows) {
    const std::int64_t count = rows.count - r < kByteRows ? rows.count - r : kByteRows;
    last_rows_of_bytes<kByteRows>(count, rows, r, weights, groups, scales, out);
  }
}

inline void multiply(const Panels& all, std::int64_t panel, const Rows& rows, float* out, float* scratch) {
  const std::uint8_t* weights = all.weights + panel * all.stride;
  const std::int64_t groups = groups_of(all.inputs);
  const float* scales = all.scales == nullptr ? all.bias : all.scales + panel * groups * kPanel;  // or never read
  if (all.precision == Precision::fp32)
    multiply_floats(reinterpret_cast<const float*>(weights), rows, all.inputs, out);
  else if (all.precision == Precision::int16)
    multiply_narrow<true>(reinterpret_cast<const std::int16_t*>(weights), scales, rows, all.inputs, out, scratch);
  else if (all.precision == Precision::bf16)
    multiply_narrow<false>(reinterpret_cast<const Bfloat16*>(weights), scales, rows, all.inputs, out, scratch);
  else
    multiply_bytes(weights, scales, rows, groups, out);
  for (int v = 0; v < kPanel; v += kLanes) {
    const F bias = load(all.bias + panel * kPanel + v);
    for (std::int64_t r = 0; r < rows.count; ++r)
      store(out + r * kPanel + v, add(load(out + r * kPanel + v), bias));
  }
}

}  // namespace tarflow::native::TARFLOW_ISA
