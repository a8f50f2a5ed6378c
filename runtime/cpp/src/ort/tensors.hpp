// Tensors as ONNX Runtime takes them: types, sizes, names of the graphs' inputs, and the order of a block's patches.
#pragma once

#include <algorithm>
#include <string>

#include "manifest.hpp"
#include "ort/library.hpp"

namespace tarflow::internal {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// One input or output of a graph in the caller's memory.
struct Place {
  const char* name;
  void* data;
  Shape shape;
  ONNXTensorElementDataType type;
};

inline std::int64_t count(const Shape& shape) {
  std::int64_t total = 1;
  for (const std::int64_t size : shape) total *= size;
  return total;
}

inline std::size_t item_size(ONNXTensorElementDataType type) { return type == kInt64 ? 8 : type == kFloat ? 4 : 2; }

// ONNX Runtime numbers types as ONNX does.
inline ONNXTensorElementDataType cache_type(const Precision& precision) {
  return static_cast<ONNXTensorElementDataType>(precision.onnx);
}
static_assert(kPrecisions[0].onnx == kFloat && kPrecisions[1].onnx == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 &&
              kPrecisions[2].onnx == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);

// Calls visit(patch, place) for each of `batch` images' patches: where one stands in (B, T, D), patch order, and where
// in (T, B, D), block order.
template <class Visit>
void match_order(const ModelShape& shape, bool reversed, std::int64_t batch, const Visit& visit) {
  const std::int64_t tokens = shape.tokens(), patch_dim = shape.patch_dim();
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      visit((b * tokens + (reversed ? tokens - 1 - t : t)) * patch_dim, (t * batch + b) * patch_dim);
    }
  }
}

// Patch order to block order, sequence first.
inline void to_sequence(const ModelShape& shape, bool reversed, std::int64_t batch, const float* patches,
                        float* sequence) {
  match_order(shape, reversed, batch, [&](std::int64_t patch, std::int64_t place) {
    std::copy_n(patches + patch, shape.patch_dim(), sequence + place);
  });
}

inline void to_patches(const ModelShape& shape, bool reversed, std::int64_t batch, const float* sequence,
                       float* patches) {
  match_order(shape, reversed, batch, [&](std::int64_t patch, std::int64_t place) {
    std::copy_n(sequence + place, shape.patch_dim(), patches + patch);
  });
}

inline std::string cache_name(std::int64_t layer, bool value) {
  return (value ? "value_" : "key_") + std::to_string(layer);
}

}  // namespace tarflow::internal
