// What a precision is: one row each. The cache has the type of matrix products and attention.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace tarflow::internal {

struct Precision {
  const char* name;
  std::size_t cache_bytes;  // of one number in the cache
  int onnx, tensorrt;       // the cache's type as ONNX and TensorRT number it; tensorrt below 0: no engines
  bool on_cpus;             // ONNX Runtime has products of it there
  bool int8;                // the products' weights are stored so
};

inline constexpr std::array<Precision, 4> kPrecisions = {{
    {"fp32", 4, 1, 0, true, false},
    {"fp16", 2, 10, 1, true, false},
    {"bf16", 2, 16, 7, false, false},
    {"int8", 4, 1, -1, true, true},
}};

// Null for what is none.
inline const Precision* find_precision(std::string_view name) {
  for (const Precision& precision : kPrecisions) {
    if (name == precision.name) return &precision;
  }
  return nullptr;
}

}  // namespace tarflow::internal
