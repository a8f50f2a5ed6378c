#include "tensorrt/steps.hpp"

#include <algorithm>
#include <utility>

#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kStepsInFlight = 4;  // launched before the host waits: how late a cancellation may come

// Patch order to block order of a reversed block, and back, of one image.
void reverse(const ModelShape& shape, float* image) {
  const std::int64_t patch = shape.patch_dim();
  for (std::int64_t a = 0, b = shape.tokens() - 1; a < b; ++a, --b) {
    std::swap_ranges(image + a * patch, image + (a + 1) * patch, image + b * patch);
  }
}

bool is_state(const std::string& name) {
  return name == "x" || name == "position" || name.rfind("key_", 0) == 0 || name.rfind("value_", 0) == 0;
}

}  // namespace

std::vector<Part> parts_of(std::int64_t images, const Profile& profile) {
  std::vector<Part> parts;
  for (std::int64_t start = 0; start < images; start += profile.batch[2]) {
    const std::int64_t rows = std::min(profile.batch[2], images - start);
    parts.push_back({start, rows, std::max(rows, profile.batch[0])});
  }
  return parts;
}

std::vector<float> images_of(const ModelShape& shape, const Part& part, const float* x) {
  const std::int64_t numbers = shape.numbers();
  std::vector<float> found(size(part.batch * numbers));
  for (std::int64_t b = 0; b < part.batch; ++b) {
    std::copy_n(x + (part.start + std::min(b, part.rows - 1)) * numbers, numbers, found.data() + b * numbers);
  }
  return found;
}

Tensor labels_of(const Branches& branches, const Part& part, Arrays& arrays) {
  std::vector<std::int64_t> found;
  for (std::int64_t g = 0; g < branches.count; ++g) {
    for (std::int64_t b = 0; b < part.batch; ++b) {
      found.push_back(branches.classes[size(g * branches.batch + part.start + std::min(b, part.rows - 1))]);
    }
  }
  return arrays.upload("labels", found, {branches.count, part.batch});
}

Steps::Steps(Engines& engines, Arrays& arrays, const Pass& pass, const Part& part, const float* z)
    : engines_(engines),
      arrays_(arrays),
      pass_(pass),
      part_(part),
      shape_(engines.bundle.manifest.shape),
      reversed_(engines.bundle.manifest.blocks[pass.block].reversed),
      profile_(engines.profile(kStep, pass.branches.count).first) {
  place_inputs(z);
  place_outputs();
}

Steps::~Steps() {
  cudaStreamSynchronize(engines_.stream);  // before what it works in is used otherwise
}

void Steps::place_inputs(const float* z) {
  const Branches& branches = pass_.branches;
  const std::int64_t batch = part_.batch, all = branches.count * batch, tokens = shape_.tokens();
  const std::int64_t patch_dim = shape_.patch_dim(), numbers = shape_.numbers();
  std::vector<float> latents = images_of(shape_, part_, z), known(latents.size(), 0.0F);
  for (std::int64_t at = 0; at < batch * numbers; at += numbers) {
    if (reversed_) reverse(shape_, latents.data() + at);
    std::copy_n(latents.data() + at, patch_dim, known.data() + at);
  }
  const std::vector<std::int64_t> zero = {0};
  inputs_ = {arrays_.upload("x", known, {batch, 1, tokens, patch_dim}),
             arrays_.upload("position", zero, {1}),
             arrays_.upload("z", latents, {batch, tokens, patch_dim}),
             arrays_.upload("offsets", zero, {1}),
             labels_of(branches, part_, arrays_),
             arrays_.upload("mix", branches.mix, {2, branches.count, tokens}),
             arrays_.upload("inverse_temperature", branches.inverse_temperature, {branches.count})};
  const auto item = static_cast<std::int64_t>(engines_.built.record.precision->cache_bytes);
  const std::int64_t bytes = all * tokens * shape_.width * item;
  for (std::int64_t layer = 0; layer < shape_.layers; ++layer) {
    for (const char* part : {"key_", "value_"}) {
      inputs_.push_back(arrays_.clear(part + text_of(layer), bytes, {all, shape_.heads(), tokens, shape_.head_dim}));
    }
  }
}

// State comes back in the memory of its input. The position alone may not: it is copied behind the step.
void Steps::place_outputs() {
  const nvinfer1::ICudaEngine& engine = engines_.get(pass_.block, kStep);
  for (const Tensor& input : inputs_) {
    if (!is_state(input.name)) continue;
    const std::string next = input.name + "_next";
    const char* alias = engine.getAliasedInputTensor(next.c_str());
    const bool in_place = alias != nullptr && input.name == alias;
    if (!in_place && input.name != "position") {
      throw bundle_error("block " + text_of(pass_.block) + "'s step engine does not update '" + input.name +
                         "' in place: it was built from a graph of an older bundle. Build the engines again");
    }
    outputs_.push_back({next, in_place ? input.address : arrays_.place(next, sizeof(std::int64_t)), {}});
  }
}

void Steps::run(bool cuda_graph, const OnStep& on_step) {
  Captured& captured = engines_.captured(pass_.block, profile_, part_.batch);
  std::vector<void*> addresses;
  for (const auto* tensors : {&inputs_, &outputs_}) {
    for (const Tensor& tensor : *tensors) addresses.push_back(tensor.address);
  }
  if (captured.graph != nullptr && captured.addresses != addresses) {  // they grew for a larger batch
    check(cudaGraphExecDestroy(std::exchange(captured.graph, nullptr)), "forget a step");
  }
  captured.addresses = std::move(addresses);
  for (std::int64_t step = 0; step + 1 < shape_.tokens(); ++step) {
    if (captured.graph != nullptr) {
      check(cudaGraphLaunch(captured.graph, engines_.stream), "replay a step");
    } else {
      launch();
      if (cuda_graph) capture(captured);  // behind a run, which loads kernels: that cannot be captured
    }
    if (step % kStepsInFlight == kStepsInFlight - 1) check(cudaStreamSynchronize(engines_.stream), "finish a step");
    on_step(step);
  }
}

void Steps::launch() {
  engines_.launch(pass_.block, kStep, profile_, inputs_, outputs_);
  void* const position = inputs_[1].address;
  void* const next = outputs_[1].address;
  if (next == position) return;
  check(cudaMemcpyAsync(position, next, sizeof(std::int64_t), cudaMemcpyDeviceToDevice, engines_.stream),
        "advance the position");
}

// Records a step as a graph.
void Steps::capture(Captured& captured) {
  cudaGraph_t recorded = nullptr;
  check(cudaStreamBeginCapture(engines_.stream, cudaStreamCaptureModeThreadLocal), "capture a step");
  try {
    launch();
  } catch (...) {
    cudaStreamEndCapture(engines_.stream, &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    throw;
  }
  check(cudaStreamEndCapture(engines_.stream, &recorded), "capture a step");
  const cudaError_t status = cudaGraphInstantiate(&captured.graph, recorded, 0);
  cudaGraphDestroy(recorded);
  check(status, "make a graph of a step");
}

void Steps::read(float* x) const {
  const std::int64_t numbers = shape_.numbers(), all = part_.rows * numbers;
  std::vector<float> known(size(all));
  arrays_.download(known.data(), inputs_[0].address, all);
  for (std::int64_t at = 0; reversed_ && at < all; at += numbers) reverse(shape_, known.data() + at);
  std::copy(known.begin(), known.end(), x + part_.start * numbers);
}

}  // namespace tarflow::internal
