// Decoding with step engines: state and cache in device memory, updated in place, one CUDA graph replays a step.
#pragma once

#include "../backend.hpp"
#include "tensorrt/engines.hpp"

namespace tarflow::internal {

// Images `start` to `start` + `rows` of those of a pass, computed as `batch`, the last one repeated to make up for
// those that an engine's least batch lacks.
struct Part {
  std::int64_t start, rows, batch;
};

// A pass in parts of a size that a profile takes.
std::vector<Part> parts_of(std::int64_t images, const Profile& profile);

// The images of a part, of x (B, T, D).
std::vector<float> images_of(const ModelShape& shape, const Part& part, const float* x);

// Their classes in every branch: the input "labels".
Tensor labels_of(const Branches& branches, const Part& part, Arrays& arrays);

// One block being solved for a part of a pass.
class Steps {
 public:
  // Throws Error(TARFLOW_BUNDLE) for an engine that does not update its state in place.
  Steps(Engines& engines, Arrays& arrays, const Pass& pass, const Part& part, const float* z);
  ~Steps();
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;

  // All positions, first to last. The host counts: a device drops what is out of bounds.
  void run(bool cuda_graph, const OnStep& on_step);

  // The part's images, to x (B, T, D).
  void read(float* x) const;

 private:
  void place_inputs(const float* z);
  void place_outputs();
  void launch();
  void capture(Captured& captured);

  Engines& engines_;
  Arrays& arrays_;
  const Pass& pass_;
  const Part part_;
  const ModelShape& shape_;
  const bool reversed_;
  const int profile_;
  std::vector<Tensor> inputs_, outputs_;  // the sequence first, the position second
};

}  // namespace tarflow::internal
