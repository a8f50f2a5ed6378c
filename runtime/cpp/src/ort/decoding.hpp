// The two ways to solve a block on ONNX Runtime, a position at a time: z (B, T, D) -> x (B, T, D), patch order.
#pragma once

#include "ort/sessions.hpp"

namespace tarflow::internal {

// With the step graph, whose cache is the host's: the way of a CPU.
void solve_stepwise(Sessions& sessions, const Pass& pass, const float* z, float* x, const OnStep& on_step);

// With the resident graph, or the CUDA provider's own, whose state stays where the provider computes: the way of a GPU.
void solve_resident(Sessions& sessions, const Pass& pass, const float* z, float* x, const OnStep& on_step);

}  // namespace tarflow::internal
