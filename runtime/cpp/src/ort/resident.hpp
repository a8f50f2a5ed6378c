// Decoding with the resident graph, or the CUDA provider's own of the same state, which stays where the provider
// computes: the way of a GPU.
#pragma once

#include <list>
#include <map>

#include "ort/sessions.hpp"

namespace tarflow::internal {

// Every tensor of the steps of all blocks, for so many images and guidance branches. State outputs are bound to their
// inputs' memory; the position is not, as a step reads it until its end: two of them take turns. One user at a time.
class ResidentSteps {
 public:
  ResidentSteps(Sessions& sessions, std::int64_t batch, std::int64_t branches);
  ~ResidentSteps();
  ResidentSteps(const ResidentSteps&) = delete;
  ResidentSteps& operator=(const ResidentSteps&) = delete;

  // z (B, T, D) -> x (B, T, D), patch order, of no more images than these steps have: the last one is computed again for
  // those that are missing.
  void solve(const Pass& pass, const float* z, float* x, const OnStep& on_step);

  // Lets go of a graph's captures, whose session is about to end. Whoever calls it touches the device.
  void forget(std::size_t block, Kind kind);

  std::size_t bytes() const;

  const std::int64_t batch, branches;

 private:
  struct Tensor {
    std::unique_ptr<Buffer> memory;
    Owned<OrtValue> value;
  };
  struct Bound {
    Session session;
    bool captured;  // and so it is begun, and not waited for
    Owned<OrtRunOptions> options;
    Owned<OrtIoBinding> binding;
  };

  void add(const std::string& name, const Shape& shape, ONNXTensorElementDataType type);
  void write(const std::string& name, const void* data);
  void read(const std::string& name, void* data);
  Kind kind(std::size_t block) const;  // of the graph that makes a step
  void launch(const Pass& pass);
  OrtStatus* wait();  // until all that was begun has ended
  Bound bind(const Pass& pass);

  Sessions& sessions_;
  const ModelShape& shape_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::pair<std::size_t, int>, Bound> bound_;  // by block and turn
  const Bound* running_ = nullptr;  // the last step that was begun
  int begun_ = 0;                   // steps, since one was waited for
  int turn_ = 0;
};

// Steps that are free to be used again: of the last few shapes, as long as there is room for them.
class IdleSteps {
 public:
  std::unique_ptr<ResidentSteps> take(Sessions& sessions, std::int64_t batch, std::int64_t branches);
  void give(std::unique_ptr<ResidentSteps> steps);

 private:
  std::mutex mutex_;
  std::list<std::unique_ptr<ResidentSteps>> free_;  // the last used first
};

// z (B, T, D) -> x (B, T, D), patch order: one block, a position at a time.
void solve_resident(Sessions& sessions, IdleSteps& idle, const Pass& pass, const float* z, float* x,
                    const OnStep& on_step);

}  // namespace tarflow::internal
