// What a flow needs from an engine. Arrays are float32 in patch order; a backend reorders for reversed blocks.
// Shapes: B images, T patches, D numbers in a patch, G guidance branches.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace tarflow::internal {

// The guidance branches of a batch.
struct Branches {
  std::int64_t batch, count;               // B, G
  std::vector<std::int64_t> labels;        // (G, B), `classes` for the null class
  std::vector<float> mix;                  // (2, G, T): weights of the branches' log_scale (0) and shift (1), per step
  std::vector<float> inverse_temperature;  // (G): multiplies attention logits
};

// One call: what it may be cancelled by, and large memory that is handed from one block's cache to the next.
// A backend that can end a running operator from another thread sets `interrupt`, and `resume` to undo it.
class Call {
 public:
  void begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = true;
    cancelled_ = false;
    if (resume) resume();
  }

  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = false;
  }

  // From any thread.
  void cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!running_) return;
    cancelled_ = true;
    if (interrupt) interrupt();
  }

  bool cancelled() const { return cancelled_; }

  std::function<void()> interrupt, resume;  // set once, before the first call
  std::shared_ptr<void> engine;             // the backend's own part of a call
  std::unique_ptr<std::byte[]> memory[2];
  std::size_t memory_size[2] = {0, 0};

 private:
  std::mutex mutex_;
  bool running_ = false;
  std::atomic<bool> cancelled_{false};
};

using OnStep = std::function<void(std::int64_t position)>;  // throws to cancel

class Backend {
 public:
  virtual ~Backend() = default;

  // Makes `call` ready to be used with the functions below.
  virtual void prepare(Call& call) const = 0;

  // z (B, T, D) -> x (B, T, D): solves one block, a position at a time.
  virtual void invert(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                      const OnStep& on_step) = 0;

  // x (B, T, D) -> z (B, T, D), log_det (B) in nats.
  virtual void forward(Call& call, std::size_t block, const float* x, const Branches& branches, float* z,
                       float* log_det) = 0;

  // Vector-Jacobian product of an unguided forward at log-determinant cotangent 1: grad (B, T, D), in place.
  virtual void gradient(Call& call, std::size_t block, const float* x, const Branches& branches, float* grad) = 0;

  virtual std::string description() const = 0;  // which engine on which device, for people
};

}  // namespace tarflow::internal
