// What a flow needs from an engine. Arrays are float32 in patch order; a backend reorders for reversed blocks.
// Shapes: B images, T patches, D numbers in a patch, G guidance branches.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "call.hpp"

namespace tarflow::internal {

// The guidance branches of a batch.
struct Branches {
  std::int64_t batch, count;               // B, G
  std::vector<std::int64_t> classes;       // (G, B), as the graphs take them: the null class comes after the last
  std::vector<float> mix;                  // (2, G, T): weights of the branches' log_scale (0) and shift (1), per step
  std::vector<float> inverse_temperature;  // (G): multiplies attention logits
};

// A batch on its way through one block.
struct Pass {
  Call& call;
  std::size_t block;
  const Branches& branches;
};

using OnStep = std::function<void(std::int64_t position)>;  // throws to cancel

class Backend {
 public:
  virtual ~Backend() = default;

  // Makes `call` ready to be used with the functions below.
  virtual void prepare(Call& call) const = 0;

  // z (B, T, D) -> x (B, T, D): solves one block, a position at a time.
  virtual void invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) = 0;

  // x (B, T, D) -> z (B, T, D), log_det (B) in nats.
  virtual void forward(const Pass& pass, const float* x, float* z, float* log_det) = 0;

  // Vector-Jacobian product of an unguided forward at log-determinant cotangent 1: grad (B, T, D), in place.
  virtual void gradient(const Pass& pass, const float* x, float* grad) = 0;

  virtual std::string description() const = 0;  // which engine on which device, for people
};

}  // namespace tarflow::internal
