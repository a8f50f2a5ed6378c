// Decoding with the resident graph, whose cache stays where the provider computes: the way of a GPU.
#include <algorithm>

#include "ort_tensors.hpp"

namespace tarflow::internal {

// The resident graph: sequence, position and cache stay in the provider's memory, each update in place. The first step
// reads them from the host, which is how they get there; the last one writes the sequence back.
class ResidentGraph {
 public:
  ResidentGraph(OrtBackend& backend, Call& call, std::size_t block, const Branches& branches)
      : backend_(backend),
        call_(call),
        block_(block),
        branches_(branches),
        shape_(backend.bundle_.manifest.shape),
        session_(backend.session(block, kResident)) {
    const OrtApi* api = backend.api_;
    const bool gpu = backend.options_.provider != "cpu";
    OrtMemoryInfo* info = nullptr;
    if (gpu) {
      backend.check(api->CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &info),
                    "it has no GPU memory");
    } else {
      backend.check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), "it has no memory");
    }
    device_ = backend.own(info);
    OrtAllocator* allocator = nullptr;
    backend.check(api->CreateAllocator(session_.get(), device_.get(), &allocator), "it has no memory on the device");
    allocator_ = backend.own(allocator);
  }

  // z and x (B, T, D) in block order.
  void solve(std::vector<float>& z, std::vector<float>& x, const OnStep& on_step) {
    const std::int64_t batch = branches_.batch, tokens = shape_.tokens(), patch_dim = shape_.patch_dim();
    const std::int64_t rows = batch * branches_.count;
    const Shape sequence = {batch, 1, tokens, patch_dim}, cache = {rows, shape_.heads(), tokens, shape_.head_dim};
    const OrtApi* api = backend_.api_;
    std::vector<std::pair<std::string, Owned<OrtValue>>> kept, host;  // by name of the input
    kept.emplace_back("x", allocate(sequence, kFloat));
    host.emplace_back("x", backend_.tensor(x.data(), sequence, kFloat));
    const std::size_t bytes = static_cast<std::size_t>(count(cache)) * backend_.cache_item_;
    const std::unique_ptr<std::byte[]> zeros(new std::byte[bytes]());
    for (std::int64_t i = 0; i < 2 * shape_.layers; ++i) {
      kept.emplace_back(cache_name(i / 2, i % 2 == 1), allocate(cache, backend_.cache_type_));
      host.emplace_back(kept.back().first, backend_.tensor(zeros.get(), cache, backend_.cache_type_));
    }
    std::int64_t zero = 0;
    const Owned<OrtValue> start = backend_.tensor(&zero, {1}, kInt64);
    const Owned<OrtValue> positions[2] = {allocate({1}, kInt64), allocate({1}, kInt64)};  // read until a step's end

    std::vector<float> mix = branches_.mix, inverse = branches_.inverse_temperature;
    std::vector<std::int64_t> labels = branches_.labels;
    const std::vector<OrtBackend::Place> inputs = {{"z", z.data(), {batch, tokens, patch_dim}, kFloat},
                                                   {"offsets", &zero, {1}, kInt64},
                                                   {"labels", labels.data(), {branches_.count, batch}, kInt64},
                                                   {"mix", mix.data(), {2, branches_.count, tokens}, kFloat},
                                                   {"inverse_temperature", inverse.data(), {branches_.count}, kFloat}};
    // Three bindings: from the host, and then by turns, as the position alternates.
    Owned<OrtIoBinding> bindings[3] = {make_binding(inputs), make_binding(inputs), make_binding(inputs)};
    for (int which = 0; which < 3; ++which) {
      OrtIoBinding* binding = bindings[which].get();
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const OrtValue* from = which == 0 ? host[i].second.get() : kept[i].second.get();
        accept(api->BindInput(binding, kept[i].first.c_str(), from));
        accept(api->BindOutput(binding, (kept[i].first + "_next").c_str(), kept[i].second.get()));
      }
      accept(api->BindInput(binding, "position", which == 0 ? start.get() : positions[which - 1].get()));
      accept(api->BindOutput(binding, "position_next", positions[which == 1 ? 1 : 0].get()));
    }
    auto* options = static_cast<OrtRunOptions*>(call_.engine.get());
    for (std::int64_t position = 0; position + 1 < tokens; ++position) {
      OrtIoBinding* binding = bindings[position == 0 ? 0 : position % 2 == 1 ? 1 : 2].get();
      if (position + 2 == tokens) accept(api->BindOutput(binding, "x_next", host[0].second.get()));
      backend_.check_run(call_, api->RunWithBinding(session_.get(), options, binding), block_, kResident);
      on_step(position);
    }
  }

 private:
  Owned<OrtValue> allocate(const Shape& shape, ONNXTensorElementDataType type) {
    OrtValue* value = nullptr;
    backend_.check_run(
        call_, backend_.api_->CreateTensorAsOrtValue(allocator_.get(), shape.data(), shape.size(), type, &value),
        block_, kResident);
    return backend_.own(value);
  }

  Owned<OrtIoBinding> make_binding(const std::vector<OrtBackend::Place>& inputs) {
    OrtIoBinding* made = nullptr;
    accept(backend_.api_->CreateIoBinding(session_.get(), &made));
    Owned<OrtIoBinding> binding = backend_.own(made);
    for (const OrtBackend::Place& place : inputs) {
      const Owned<OrtValue> value = backend_.tensor(place.data, place.shape, place.type);
      accept(backend_.api_->BindInput(made, place.name, value.get()));
    }
    return binding;
  }

  void accept(OrtStatus* status) { backend_.check_run(call_, status, block_, kResident); }

  OrtBackend& backend_;
  Call& call_;
  const std::size_t block_;
  const Branches& branches_;
  const ModelShape& shape_;
  const OrtBackend::Session session_;
  Owned<OrtMemoryInfo> device_{nullptr, Release{}};
  Owned<OrtAllocator> allocator_{nullptr, Release{}};
};

void OrtBackend::invert_resident(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                                 const OnStep& on_step) {
  const ModelShape& shape = bundle_.manifest.shape;
  const std::int64_t tokens = shape.tokens(), patch_dim = shape.patch_dim(), numbers = shape.numbers();
  const bool reversed = bundle_.manifest.blocks[block].reversed;
  std::vector<float> latents(static_cast<std::size_t>(branches.batch * numbers)), found = latents;
  for (std::int64_t at = 0; at < branches.batch * numbers; at += numbers) {  // of one image (T, 1, D) is (1, T, D)
    to_sequence(z + at, 1, tokens, patch_dim, reversed, latents.data() + at);
    std::copy_n(latents.data() + at, patch_dim, found.data() + at);
  }
  ResidentGraph(*this, call, block, branches).solve(latents, found, on_step);
  for (std::int64_t at = 0; at < branches.batch * numbers; at += numbers) {
    to_patches(found.data() + at, 1, tokens, patch_dim, reversed, x + at);
  }
}

}  // namespace tarflow::internal
