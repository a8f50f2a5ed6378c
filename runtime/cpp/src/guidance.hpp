// Guidance: what pulls samples towards a class, or away from a blunted copy of the model.
#pragma once

#include <vector>

#include "backend.hpp"
#include "manifest.hpp"
#include "tarflow.h"

namespace tarflow::internal {

// (1 + scale) * conditional - scale * unconditional, of the parts guided.
struct Guidance {
  // Throws Error(TARFLOW_INPUT) for values that make no guidance.
  explicit Guidance(const tarflow_sample_options& said);

  // Throws Error(TARFLOW_INPUT) if it does nothing for samples of these classes.
  void check(const ModelShape& shape, const std::vector<std::int64_t>& classes) const;

  bool none() const { return scale == 0; }

  // The branches that draw samples of `classes`.
  Branches branches(const ModelShape& shape, std::vector<std::int64_t> classes) const;

  const double scale;
  const bool log_scale, shift;         // the parts guided
  const bool annealed;                 // the scale grows linearly along the sequence
  const double attention_temperature;  // divides the attention logits of the unconditional branch
};

// One branch: no guidance.
Branches plain(const ModelShape& shape, std::vector<std::int64_t> classes);

}  // namespace tarflow::internal
