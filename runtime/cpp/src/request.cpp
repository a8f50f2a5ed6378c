#include "request.hpp"

#include <algorithm>
#include <new>

#include "error.hpp"
#include "inputs.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kReproducibleTile = 16;  // the same as Python's
constexpr std::int64_t kLargestBatch = 64;
constexpr double kCacheBudget = 0x1p31;   // bytes of keys and values that a default batch may take
constexpr double kLargestCache = 0x1p50;  // bytes; beyond what machines have, and far from where integers overflow

const float* checked_noise(const ModelShape& shape, std::int64_t n, const float* noise, bool redraw) {
  if (noise == nullptr) return nullptr;
  if (redraw) throw input_error("samples of given noise cannot be redrawn: drop `redraw_nonfinite`, or draw by seed");
  return checked_finite(shape, n, noise, "noise");
}

std::optional<double> strength_of(const ModelShape& shape, double denoise) {
  if (denoise == 0) return std::nullopt;
  if (denoise != TARFLOW_DENOISE_AS_TRAINED) return checked_strength(shape, denoise, "denoise");
  return shape.noise_std.value_or(0) > 0 ? std::optional(1.0) : std::nullopt;
}

std::int64_t tile_of(const Manifest& model, std::int64_t n, const tarflow_sample_options& said) {
  if (said.batch_size < 0) throw field_error("batch_size", said.batch_size, "1 or more, or 0 to have it chosen");
  const std::int64_t branches = said.guidance == 0 ? 1 : 2;
  const std::int64_t tile = said.reproducible != 0 ? kReproducibleTile
                            : said.batch_size > 0  ? std::min(said.batch_size, n)
                                                   : default_batch(model, branches);
  if (model.cache_bytes() * double(branches) * double(tile) > kLargestCache) throw std::bad_alloc();
  return tile;
}

}  // namespace

Request::Request(const Manifest& model, std::int64_t n, const float* noise, const std::int64_t* labels,
                 const tarflow_sample_options& said)
    : n(checked_count(model.shape, n, said.first_sample)),
      noise(checked_noise(model.shape, n, noise, said.redraw_nonfinite != 0)),
      classes(checked_labels(model.shape, n, labels)),
      seed(said.seed),
      first_sample(said.first_sample),
      guidance(said),
      strength(strength_of(model.shape, said.denoise)),
      certify(said.certify != 0),
      redraw_nonfinite(said.redraw_nonfinite != 0),
      reproducible(said.reproducible != 0),
      tile(tile_of(model, n, said)),
      progress(said.progress),
      preview(said.preview),
      user(said.user) {
  guidance.check(model.shape, classes);
}

std::int64_t default_batch(const Manifest& model, std::int64_t branches) {
  const double rows = kCacheBudget / (model.cache_bytes() * double(branches));
  return static_cast<std::int64_t>(std::clamp(rows, 1.0, double(kLargestBatch)));
}

}  // namespace tarflow::internal
