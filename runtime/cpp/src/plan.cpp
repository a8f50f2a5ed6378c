// What the caller of a flow said, checked.
#include <algorithm>
#include <cmath>

#include "error.hpp"
#include "patches.hpp"
#include "run.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kTile = 16;  // of a reproducible run; the same as Python's
constexpr double kLargestCache = 0x1p50;   // bytes; beyond what machines have, and far from where integers overflow
constexpr double kLargestResult = 0x1p40;  // bytes; a slip of the keyboard, not a request

std::string number(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  return text.back() == '.' ? text + "0" : text;
}

}  // namespace

Flow::Run Flow::plan(std::int64_t n, const float* noise, const std::int64_t* labels,
                     const tarflow_sample_options& options) const {
  if (n < 1) throw input_error("n is " + std::to_string(n) + "; expected 1 or more samples");
  if (double(n) * double(shape_.numbers()) * sizeof(float) > kLargestResult) {
    throw input_error("n is " + std::to_string(n) +
                      ": more than 1 TiB of samples; draw them in parts, by first_sample");
  }
  if (static_cast<std::uint64_t>(n - 1) > UINT64_MAX - options.first_sample) {
    throw input_error("first_sample is " + std::to_string(options.first_sample) + " and n " + std::to_string(n) +
                      "; sample indices end at 2^64 - 1");
  }
  if (noise != nullptr) {
    for (std::int64_t row = 0; row < n; ++row) {
      if (!finite(noise + row * shape_.numbers(), shape_.numbers())) {
        throw input_error("noise is not finite, first in row " + std::to_string(row));
      }
    }
    if (options.redraw_nonfinite != 0) {
      throw input_error("samples of given noise cannot be redrawn: drop redraw_nonfinite, or draw by seed");
    }
  }
  const std::string guided = options.guided != nullptr ? options.guided : "ab";
  if (!(options.guidance >= 0) || !std::isfinite(options.guidance)) {
    throw input_error("guidance scale is " + number(options.guidance) +
                      "; expected 0 (none) or a positive number, 1 to 3 is usual");
  }
  if (guided != "a" && guided != "b" && guided != "ab") {
    throw input_error("guidance of '" + guided + "' is unknown; expected ab, a (log_scale) or b (shift)");
  }
  const double temperature = options.attention_temperature;
  if (!(temperature > 0) || !std::isfinite(temperature)) {
    throw input_error("attention temperature is " + number(temperature) + "; expected a positive number");
  }
  Run run{n, noise, classes(n, labels), options, -1.0, 0, 0, 0, {}};
  run.options.guided = guided == "a" ? "a" : guided == "b" ? "b" : "ab";
  const bool unlabelled =
      std::all_of(run.labels.begin(), run.labels.end(), [&](std::int64_t label) { return label == shape_.classes; });
  if (options.guidance == 0 && temperature != 1) {
    throw input_error("attention temperature " + number(temperature) +
                      " does nothing without guidance; give a guidance scale above 0 too");
  }
  if (options.guidance > 0 && guided == "a" && !shape_.nvp) {
    throw input_error("a volume-preserving model has no log_scale, so guiding 'a' does nothing; guide 'b'");
  }
  if (options.guidance > 0 && temperature == 1 && unlabelled) {
    throw input_error("guidance " + number(options.guidance) +
                      " does nothing for samples without a label at attention temperature 1: both branches are the "
                      "same, at twice the cost; " +
                      (shape_.classes > 0 ? "give labels, or " : "") +
                      "pass an attention temperature other than 1, or guidance 0");
  }
  if (options.batch_size < 0) {
    throw input_error("batch size is " + std::to_string(options.batch_size) + "; expected 1 or more, or 0");
  }
  if (options.denoise == TARFLOW_DENOISE_AS_TRAINED) {
    run.strength = shape_.noise_std.value_or(0) > 0 ? 1.0 : -1.0;
  } else if (options.denoise != 0) {
    run.strength = checked_strength(options.denoise);
  }
  run.tile = options.reproducible != 0 ? kTile
             : options.batch_size > 0  ? std::min(options.batch_size, n)
                                       : default_batch(options.guidance > 0);
  if (cache_row(options.guidance > 0) * double(run.tile) > kLargestCache) throw std::bad_alloc();
  const auto tile = static_cast<std::uint64_t>(run.tile);
  const std::uint64_t offset = options.reproducible != 0 ? options.first_sample % tile : 0;
  const auto tiles = static_cast<std::int64_t>((offset + static_cast<std::uint64_t>(n) + tile - 1) / tile);
  run.total = tiles * shape_.blocks * (shape_.tokens() - 1);
  return run;
}

double Flow::checked_strength(double strength) const {
  if (!shape_.noise_std) {
    throw input_error(
        "this model was trained with uniform dequantisation: there is no Gaussian noise to remove; set denoise to 0");
  }
  if (!(strength >= 0) || !std::isfinite(strength)) {
    throw input_error("denoising strength is " + number(strength) +
                      "; expected a number of 0 or more, 1 is the theory's");
  }
  return strength;
}

// As the graphs take them: the null class comes after the last.
std::vector<std::int64_t> Flow::classes(std::int64_t n, const std::int64_t* labels) const {
  std::vector<std::int64_t> all(size(n), shape_.classes);
  for (std::int64_t i = 0; labels != nullptr && i < n; ++i) {
    if (labels[i] < 0) continue;
    if (shape_.classes == 0) throw input_error("this model is unconditional and takes no labels; drop them");
    if (labels[i] >= shape_.classes) {
      throw input_error("label " + std::to_string(labels[i]) + " is out of range; this model has classes 0 to " +
                        std::to_string(shape_.classes - 1) + ", and -1 for none");
    }
    all[size(i)] = labels[i];
  }
  return all;
}

void Flow::check_images(std::int64_t n, const float* images) const {
  for (std::int64_t row = 0; row < n; ++row) {
    if (!finite(images + row * shape_.numbers(), shape_.numbers())) {
      throw input_error("images are not finite, first in row " + std::to_string(row));
    }
  }
}

}  // namespace tarflow::internal
