// What the caller of the C API said, checked. Everything here throws Error(TARFLOW_INPUT), with the cure.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.hpp"

namespace tarflow::internal {

// n samples of a model, from index `first` on.
std::int64_t checked_count(const ModelShape& shape, std::int64_t n, std::uint64_t first);

// A class for each of n labels (null: all -1), as the graphs take them: the null class comes after the last.
std::vector<std::int64_t> checked_labels(const ModelShape& shape, std::int64_t n, const std::int64_t* labels);

// `rows` times numbers of an image, all finite.
const float* checked_finite(const ModelShape& shape, std::int64_t rows, const float* numbers, const char* field);

// The factor on sigma^2 when denoising, given as this field.
double checked_strength(const ModelShape& shape, double strength, const char* field);

// Images that were given, (n, channels, size, size), and a class for each.
struct Images {
  Images(const ModelShape& shape, std::int64_t n, const float* images, const std::int64_t* labels);

  const std::int64_t n;
  const float* const pixels;
  const std::vector<std::int64_t> classes;
};

}  // namespace tarflow::internal
