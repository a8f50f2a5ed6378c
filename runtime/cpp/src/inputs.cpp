#include "inputs.hpp"

#include <cmath>

#include "error.hpp"
#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr double kLargestResult = 0x1p40;  // bytes; a slip of the keyboard, not a request

}  // namespace

std::int64_t checked_count(const ModelShape& shape, std::int64_t n, std::uint64_t first) {
  if (n < 1) throw field_error("n", n, "1 or more samples");
  if (double(n) * double(shape.numbers()) * sizeof(float) > kLargestResult) {
    throw field_error("n", n, "1 TiB of samples at most: draw them in parts, by `first_sample`");
  }
  if (static_cast<std::uint64_t>(n - 1) > UINT64_MAX - first) {
    throw input_error("sample indices end at 2^64 - 1; found " + text_of(n) + " samples from " + text_of(first) +
                      " on");
  }
  return n;
}

std::vector<std::int64_t> checked_labels(const ModelShape& shape, std::int64_t n, const std::int64_t* labels) {
  std::vector<std::int64_t> classes(size(n), shape.classes);
  for (std::int64_t i = 0; labels != nullptr && i < n; ++i) {
    if (labels[i] == -1) continue;
    if (shape.classes == 0) throw input_error("this model is unconditional and takes no `labels`; drop them");
    if (labels[i] < 0 || labels[i] >= shape.classes) {
      throw input_error("label " + text_of(labels[i]) + " is out of range; this model has classes 0 to " +
                        text_of(shape.classes - 1) + ", and -1 for none");
    }
    classes[size(i)] = labels[i];
  }
  return classes;
}

const float* checked_finite(const ModelShape& shape, std::int64_t rows, const float* numbers, const char* field) {
  for (std::int64_t row = 0; row < rows; ++row) {
    if (finite(numbers + row * shape.numbers(), shape.numbers())) continue;
    throw input_error("`" + std::string(field) + "` is not finite, the first at row " + text_of(row));
  }
  return numbers;
}

double checked_strength(const ModelShape& shape, double strength, const char* field) {
  if (!shape.noise_std) {
    throw input_error(
        "this model was trained with uniform dequantisation: there is no Gaussian noise to remove; draw without "
        "`denoise`");
  }
  if (strength >= 0 && std::isfinite(strength)) return strength;
  throw field_error(field, strength, "a strength of 0 or more, 1 is the theory's");
}

Images::Images(const ModelShape& shape, std::int64_t n, const float* images, const std::int64_t* labels)
    : n(n > 0 ? n : throw field_error("n", n, "1 or more images")),
      pixels(checked_finite(shape, n, images, "images")),
      classes(checked_labels(shape, n, labels)) {}

}  // namespace tarflow::internal
