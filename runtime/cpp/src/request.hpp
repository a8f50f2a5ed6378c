// What to draw: n samples, of which noise and classes, decoded and denoised how. Checked once against the model.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "guidance.hpp"
#include "manifest.hpp"
#include "tarflow.h"

namespace tarflow::internal {

struct Request {
  // What tarflow_sample (`noise` null) or tarflow_decode was asked for. Throws Error(TARFLOW_INPUT), and
  // std::bad_alloc for batches that no memory holds.
  Request(const Manifest& model, std::int64_t n, const float* noise, const std::int64_t* labels,
          const tarflow_sample_options& said);

  const std::int64_t n;
  const float* const noise;                 // (n, T, D); null: drawn by seed
  const std::vector<std::int64_t> classes;  // (n), as the graphs take them
  const std::uint64_t seed, first_sample;
  const Guidance guidance;
  const std::optional<double> strength;  // of denoising, if any: the factor on sigma^2
  const bool certify, redraw_nonfinite, reproducible;
  const std::int64_t tile;  // samples that are computed together
  const tarflow_progress progress;
  const tarflow_preview preview;
  void* const user;
};

// Samples to compute together where nobody says how many.
std::int64_t default_batch(const Manifest& model, std::int64_t branches);

}  // namespace tarflow::internal
