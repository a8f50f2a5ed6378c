// One call of Flow::sample, and one batch of it.
#pragma once

#include <vector>

#include "flow.hpp"

namespace tarflow::internal {

struct Flow::Run {
  std::int64_t n;
  const float* noise;  // of all n samples, or null
  std::vector<std::int64_t> labels;
  tarflow_sample_options options;
  double strength;  // of denoising; below 0: none
  std::int64_t tile, done, total;
  std::vector<float> certificate;
};

// Rows of one batch from sample index `start` on: those asked for begin at row `before` and go to `output` of the
// run's.
struct Flow::Tile {
  std::uint64_t start;
  std::int64_t rows, before, inside, output;
};

}  // namespace tarflow::internal
