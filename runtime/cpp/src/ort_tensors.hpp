// Tensors as ONNX Runtime takes them: types, sizes, names of the graphs' inputs, and the order of a block's patches.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "ort.hpp"

namespace tarflow::internal {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

using Shape = std::vector<std::int64_t>;

inline std::int64_t count(const Shape& shape) {
  std::int64_t total = 1;
  for (const std::int64_t size : shape) total *= size;
  return total;
}

inline std::size_t item_size(ONNXTensorElementDataType type) { return type == kInt64 ? 8 : type == kFloat ? 4 : 2; }

// (B, T, D) or rows of it, patch order to block order and back, sequence first: (T, B, D).
inline void to_sequence(const float* patches, std::int64_t batch, std::int64_t tokens, std::int64_t patch_dim,
                        bool reversed, float* sequence) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t from = reversed ? tokens - 1 - t : t;
      std::memcpy(sequence + (t * batch + b) * patch_dim, patches + (b * tokens + from) * patch_dim,
                  static_cast<std::size_t>(patch_dim) * sizeof(float));
    }
  }
}

inline void to_patches(const float* sequence, std::int64_t batch, std::int64_t tokens, std::int64_t patch_dim,
                       bool reversed, float* patches) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t to = reversed ? tokens - 1 - t : t;
      std::memcpy(patches + (b * tokens + to) * patch_dim, sequence + (t * batch + b) * patch_dim,
                  static_cast<std::size_t>(patch_dim) * sizeof(float));
    }
  }
}

inline std::string cache_name(std::int64_t layer, bool value) {
  return (value ? "value_" : "key_") + std::to_string(layer);
}

}  // namespace tarflow::internal
