// Images and their patches: (n, channels, size, size) and (n, T, D).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "manifest.hpp"

namespace tarflow::internal {

inline std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

inline bool finite(const float* numbers, std::int64_t count) {
  return std::all_of(numbers, numbers + count, [](float number) { return std::isfinite(number); });
}

// Calls visit(pixel, number) for every number of an image (channels, size, size) and of its patches (T, D).
template <class Visit>
inline void match(const ModelShape& shape, const Visit& visit) {
  const std::int64_t side = shape.image_size / shape.patch_size, patch = shape.patch_size;
  std::int64_t number = 0;
  for (std::int64_t row = 0; row < side; ++row) {
    for (std::int64_t column = 0; column < side; ++column) {
      for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
        for (std::int64_t y = 0; y < patch; ++y) {
          const std::int64_t pixel = (channel * shape.image_size + row * patch + y) * shape.image_size + column * patch;
          for (std::int64_t x = 0; x < patch; ++x) visit(pixel + x, number++);
        }
      }
    }
  }
}

inline void patchify(const ModelShape& shape, std::int64_t n, const float* images, float* patches) {
  for (std::int64_t i = 0; i < n; ++i, images += shape.numbers(), patches += shape.numbers()) {
    match(shape, [&](std::int64_t pixel, std::int64_t number) { patches[number] = images[pixel]; });
  }
}

inline void unpatchify(const ModelShape& shape, std::int64_t n, const float* patches, float* images) {
  for (std::int64_t i = 0; i < n; ++i, images += shape.numbers(), patches += shape.numbers()) {
    match(shape, [&](std::int64_t pixel, std::int64_t number) { images[pixel] = patches[number]; });
  }
}

}  // namespace tarflow::internal
