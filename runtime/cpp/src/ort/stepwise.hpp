// Decoding with the step graph, whose cache is the host's: the way of a CPU.
#pragma once

#include "ort/sessions.hpp"

namespace tarflow::internal {

// z (B, T, D) -> x (B, T, D), patch order: one block, a position at a time.
void solve_stepwise(Sessions& sessions, const Pass& pass, const float* z, float* x, const OnStep& on_step);

}  // namespace tarflow::internal
