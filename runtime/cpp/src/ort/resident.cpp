// Decoding with the resident graph, or the CUDA provider's own of the same state, which stays where it computes.
#include <algorithm>

#include "ort/decoding.hpp"
#include "patches.hpp"

namespace tarflow::internal {
namespace {

// The graph of a step: the CUDA provider's own, where the bundle has one.
Kind kind_of(const Sessions& sessions, const Pass& pass) {
  const Kind own = pass.branches.count == 1 ? kCuda : kCudaGuided;
  return sessions.opening.on_cpu() || sessions.bundle.graph(pass.block, own).empty() ? kResident : own;
}

// Sequence, position and cache stay in the provider's memory, each update in place. The first step reads them from the
// host, which is how they get there; the last one writes the sequence back.
class ResidentGraph {
 public:
  ResidentGraph(Sessions& sessions, const Pass& pass)
      : sessions_(sessions),
        api_(sessions.library.api),
        pass_(pass),
        shape_(sessions.bundle.manifest.shape),
        kind_(kind_of(sessions, pass)),
        session_(sessions.get(pass.block, kind_, sizes(kind_, pass.branches))) {
    OrtMemoryInfo* info = nullptr;
    OrtStatus* status = sessions.opening.on_cpu()
                            ? api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info)
                            : api_->CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &info);
    sessions.library.check(status, "it has no memory");
    device_ = sessions.library.own(info);
    OrtAllocator* allocator = nullptr;
    sessions.library.check(api_->CreateAllocator(session_.get(), device_.get(), &allocator),
                           "it has no memory on the device");
    allocator_ = sessions.library.own(allocator);
  }

  // z and x (B, T, D) in block order.
  void solve(std::vector<float>& z, std::vector<float>& x, const OnStep& on_step) {
    const Branches& branches = pass_.branches;
    const std::int64_t batch = branches.batch, tokens = shape_.tokens(), patch_dim = shape_.patch_dim();
    const Shape cache = {batch * branches.count, shape_.heads(), tokens, shape_.head_dim};
    const Precision& precision = *sessions_.bundle.manifest.precision;
    const std::unique_ptr<std::byte[]> zeros(new std::byte[size(count(cache)) * precision.cache_bytes]());
    keep({"x", x.data(), {batch, 1, tokens, patch_dim}, kFloat});
    for (std::int64_t i = 0; i < 2 * shape_.layers; ++i) {
      const std::string name = cache_name(i / 2, i % 2 == 1);
      keep({name.c_str(), zeros.get(), cache, cache_type(precision)});
    }
    std::int64_t zero = 0;
    const Owned<OrtValue> start = sessions_.library.tensor(&zero, {1}, kInt64);
    const Owned<OrtValue> positions[2] = {allocate({1}, kInt64), allocate({1}, kInt64)};  // read until a step's end
    std::vector<float> mix = branches.mix, inverse = branches.inverse_temperature;
    std::vector<std::int64_t> labels = branches.classes;
    std::vector<Place> inputs = {{"z", z.data(), {batch, tokens, patch_dim}, kFloat},
                                 {"labels", labels.data(), {branches.count, batch}, kInt64},
                                 {"mix", mix.data(), {2, branches.count, tokens}, kFloat},
                                 {"inverse_temperature", inverse.data(), {branches.count}, kFloat}};
    if (kind_ == kResident) inputs.push_back({"offsets", &zero, {1}, kInt64});
    // Three bindings: from the host, and then by turns, as the position alternates.
    const Owned<OrtIoBinding> bindings[3] = {bind(inputs, true), bind(inputs, false), bind(inputs, false)};
    for (int which = 0; which < 3; ++which) {
      OrtIoBinding* binding = bindings[which].get();
      accept(api_->BindInput(binding, "position", which == 0 ? start.get() : positions[which - 1].get()));
      accept(api_->BindOutput(binding, "position_next", positions[which == 1 ? 1 : 0].get()));
    }
    auto* options = static_cast<OrtRunOptions*>(pass_.call.engine.get());
    for (std::int64_t position = 0; position + 1 < tokens; ++position) {
      OrtIoBinding* binding = bindings[position == 0 ? 0 : position % 2 == 1 ? 1 : 2].get();
      if (position + 2 == tokens) accept(api_->BindOutput(binding, "x_next", state_.front().host.get()));
      accept(api_->RunWithBinding(session_.get(), options, binding));
      on_step(position);
    }
  }

 private:
  // A state that comes back as NAME_next: where the first step reads it, and where it stays.
  struct State {
    std::string name;
    Owned<OrtValue> host, kept;
  };

  static Fixed sizes(Kind kind, const Branches& branches) {
    return kind == kResident ? Fixed{} : Fixed{branches.batch, branches.count};
  }

  void keep(const Place& place) {
    state_.push_back(
        {place.name, sessions_.library.tensor(place.data, place.shape, place.type), allocate(place.shape, place.type)});
  }

  Owned<OrtValue> allocate(const Shape& shape, ONNXTensorElementDataType type) {
    OrtValue* value = nullptr;
    accept(api_->CreateTensorAsOrtValue(allocator_.get(), shape.data(), shape.size(), type, &value));
    return sessions_.library.own(value);
  }

  // All inputs and outputs but the position.
  Owned<OrtIoBinding> bind(const std::vector<Place>& inputs, bool from_host) {
    OrtIoBinding* made = nullptr;
    accept(api_->CreateIoBinding(session_.get(), &made));
    Owned<OrtIoBinding> binding = sessions_.library.own(made);
    for (const Place& place : inputs) {
      const Owned<OrtValue> value = sessions_.library.tensor(place.data, place.shape, place.type);
      accept(api_->BindInput(made, place.name, value.get()));
    }
    for (const State& state : state_) {
      accept(api_->BindInput(made, state.name.c_str(), (from_host ? state.host : state.kept).get()));
      accept(api_->BindOutput(made, (state.name + "_next").c_str(), state.kept.get()));
    }
    return binding;
  }

  void accept(OrtStatus* status) const { sessions_.check_run(status, pass_, kind_); }

  Sessions& sessions_;
  const OrtApi* const api_;
  const Pass& pass_;
  const ModelShape& shape_;
  const Kind kind_;
  const Session session_;
  Owned<OrtMemoryInfo> device_;
  Owned<OrtAllocator> allocator_;
  std::vector<State> state_;  // the sequence first
};

}  // namespace

void solve_resident(Sessions& sessions, const Pass& pass, const float* z, float* x, const OnStep& on_step) {
  const ModelShape& shape = sessions.bundle.manifest.shape;
  const bool reversed = sessions.bundle.manifest.blocks[pass.block].reversed;
  const std::int64_t numbers = shape.numbers(), all = pass.branches.batch * numbers;
  std::vector<float> latents(size(all)), found = latents;
  for (std::int64_t at = 0; at < all; at += numbers) {  // of one image (T, 1, D) is (1, T, D)
    to_sequence(shape, reversed, 1, z + at, latents.data() + at);
    std::copy_n(latents.data() + at, shape.patch_dim(), found.data() + at);
  }
  ResidentGraph(sessions, pass).solve(latents, found, on_step);
  for (std::int64_t at = 0; at < all; at += numbers) to_patches(shape, reversed, 1, found.data() + at, x + at);
}

}  // namespace tarflow::internal
