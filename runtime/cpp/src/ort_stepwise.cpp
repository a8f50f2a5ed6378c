// Decoding with the step graph, whose cache is the host's: the way of a CPU.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ort_tensors.hpp"

namespace tarflow::internal {
namespace {

constexpr float kMasked = -1e30F;  // exp() of it is exactly 0

}  // namespace

// The step graph: its cache is read only, this class stores the new keys and values. Every buffer is allocated before
// the loop of steps, but for the cache, which grows in buckets, so that early steps do not pay for empty slots.
class StepGraph {
 public:
  StepGraph(OrtBackend& backend, Call& call, std::size_t block, const Branches& branches)
      : backend_(backend),
        call_(call),
        block_(block),
        branches_(branches),
        shape_(backend.bundle_.manifest.shape),
        session_(backend.session(block, kStep)),
        reversed_(backend.bundle_.manifest.blocks[block].reversed),
        batch_(branches.batch),
        rows_(branches.batch * branches.count),
        outputs_(shape_.patch_dim() * (shape_.nvp ? 2 : 1)),
        heads_(2 * shape_.layers * rows_ * shape_.heads()) {
    const auto zeros = [](std::int64_t size) { return std::vector<float>(static_cast<std::size_t>(size)); };
    x_in_ = zeros(batch_ * shape_.patch_dim());
    z_in_ = x_out_ = x_in_;
    index_.resize(static_cast<std::size_t>(batch_));
    mix_ = zeros(branches.count * batch_ * outputs_);
    const auto root = static_cast<float>(std::sqrt(static_cast<float>(shape_.head_dim)));
    for (const float inverse : branches.inverse_temperature) {
      query_scale_.insert(query_scale_.end(), static_cast<std::size_t>(batch_), inverse / root);
    }
    const std::int64_t tokens = shape_.tokens();
    for (std::int64_t i = 0; i < 2 * branches.count; ++i) {
      const float* row = branches.mix.data() + i * tokens;
      mix_varies_ |= !std::all_of(row, row + tokens, [row](float weight) { return weight == row[0]; });
    }
    fill_mix(0);
    fresh_.reset(new std::byte[static_cast<std::size_t>(heads_ * shape_.head_dim) * backend.cache_item_]);
    // Larger buckets make attention read more empty slots, smaller ones copy the cache more often.
    bucket_ = 16 * static_cast<std::int64_t>(std::ceil(std::sqrt(3.0 * double(tokens)) / 16));
    const std::size_t whole = static_cast<std::size_t>(heads_ * shape_.head_dim * tokens) * backend.cache_item_;
    for (int i = 0; i < 2; ++i) {
      if (call.memory_size[i] == whole) continue;
      call.memory_size[i] = 0;
      call.memory[i].reset();  // before there are two
      call.memory[i].reset(new std::byte[whole]);
      call.memory_size[i] = whole;
    }
  }

  // x and z (T, B, D) in block order; x is known up to `position`.
  void step(std::int64_t position, float* x, const float* z) {
    if (position == capacity_) grow();
    const std::int64_t patch = batch_ * shape_.patch_dim();
    if (position > 0) bias_[static_cast<std::size_t>(position - 1)] = 0;
    std::copy_n(x + position * patch, patch, x_in_.data());
    std::copy_n(z + (position + 1) * patch, patch, z_in_.data());
    std::fill(index_.begin(), index_.end(), reversed_ ? shape_.tokens() - 1 - position : position);
    if (mix_varies_) fill_mix(position);
    auto* options = static_cast<OrtRunOptions*>(call_.engine.get());
    backend_.check_run(call_, backend_.api_->RunWithBinding(session_.get(), options, binding_.get()), block_, kStep);
    const std::size_t item = static_cast<std::size_t>(shape_.head_dim) * backend_.cache_item_;
    for (std::int64_t head = 0; head < heads_; ++head) {
      std::memcpy(cache_ + static_cast<std::size_t>(head * capacity_ + position) * item,
                  fresh_.get() + static_cast<std::size_t>(head) * item, item);
    }
    std::copy_n(x_out_.data(), patch, x + (position + 1) * patch);
  }

 private:
  // (G, B, outputs): each branch's weight of log_scale, then of shift, at this step.
  void fill_mix(std::int64_t position) {
    const std::int64_t tokens = shape_.tokens(), parts = shape_.nvp ? 2 : 1;
    float* to = mix_.data();
    for (std::int64_t g = 0; g < branches_.count; ++g) {
      for (std::int64_t b = 0; b < batch_; ++b) {
        for (std::int64_t part = 2 - parts; part < 2; ++part) {
          to = std::fill_n(to, shape_.patch_dim(),
                           branches_.mix[static_cast<std::size_t>((part * branches_.count + g) * tokens + position)]);
        }
      }
    }
  }

  // Room for another bucket of slots, in the other half of the memory.
  void grow() {
    const std::int64_t grown = std::min(shape_.tokens(), capacity_ + bucket_);
    const std::size_t item = static_cast<std::size_t>(shape_.head_dim) * backend_.cache_item_;
    half_ = 1 - half_;
    std::byte* cache = call_.memory[half_].get();
    for (std::int64_t head = 0; head < heads_; ++head) {
      std::byte* to = cache + static_cast<std::size_t>(head * grown) * item;
      const std::size_t known = static_cast<std::size_t>(capacity_) * item;
      if (known > 0) std::memcpy(to, cache_ + static_cast<std::size_t>(head * capacity_) * item, known);
      std::memset(to + known, 0, static_cast<std::size_t>(grown - capacity_) * item);  // masked, but must be finite
    }
    std::vector<float> bias(static_cast<std::size_t>(grown + 1), kMasked);
    std::fill_n(bias.begin(), std::max<std::int64_t>(0, capacity_ - 1), 0.0F);
    bias.back() = 0;  // the window's own patch
    bias_ = std::move(bias);
    cache_ = cache;
    capacity_ = grown;
    bind();
  }

  void bind() {
    const OrtApi* api = backend_.api_;
    OrtIoBinding* made = nullptr;
    backend_.check(api->CreateIoBinding(session_.get(), &made), "it binds nothing");
    binding_ = backend_.own(made);
    const auto refused = "it refuses to bind a tensor";
    const auto input = [&](const std::string& name, void* data, const Shape& shape, ONNXTensorElementDataType type) {
      const Owned<OrtValue> value = backend_.tensor(data, shape, type);  // the binding keeps it
      backend_.check_run(call_, api->BindInput(made, name.c_str(), value.get()), block_, kStep);
    };
    const std::int64_t patch_dim = shape_.patch_dim(), heads = shape_.heads(), head_dim = shape_.head_dim;
    labels_ = branches_.labels;
    input("x", x_in_.data(), {batch_, patch_dim}, kFloat);
    input("z", z_in_.data(), {batch_, patch_dim}, kFloat);
    input("index", index_.data(), {batch_}, kInt64);
    input("labels", labels_.data(), {branches_.count, batch_}, kInt64);
    input("mix", mix_.data(), {branches_.count, batch_, outputs_}, kFloat);
    input("query_scale", query_scale_.data(), {rows_, 1, 1, 1}, kFloat);
    input("bias", bias_.data(), {1, capacity_ + 1}, kFloat);
    const std::size_t size = static_cast<std::size_t>(rows_ * heads * capacity_ * head_dim) * backend_.cache_item_;
    for (std::int64_t i = 0; i < 2 * shape_.layers; ++i) {
      input(cache_name(i / 2, i % 2 == 1), cache_ + static_cast<std::size_t>(i) * size,
            {rows_, heads, capacity_, head_dim}, backend_.cache_type_);
    }
    const auto output = [&](const char* name, void* data, const Shape& shape, ONNXTensorElementDataType type) {
      const Owned<OrtValue> value = backend_.tensor(data, shape, type);
      backend_.check(api->BindOutput(made, name, value.get()), refused);
    };
    output("x_next", x_out_.data(), {batch_, patch_dim}, kFloat);
    output("fresh", fresh_.get(), {2 * shape_.layers * rows_, heads, 1, head_dim}, backend_.cache_type_);
  }

  OrtBackend& backend_;
  Call& call_;
  const std::size_t block_;
  const Branches& branches_;
  const ModelShape& shape_;
  const OrtBackend::Session session_;
  const bool reversed_;
  const std::int64_t batch_, rows_, outputs_, heads_;
  std::vector<float> x_in_, z_in_, x_out_, mix_, query_scale_, bias_;
  std::vector<std::int64_t> index_, labels_;
  bool mix_varies_ = false;
  std::unique_ptr<std::byte[]> fresh_;
  std::byte* cache_ = nullptr;  // (2 * layers, R, H, capacity, d)
  std::int64_t capacity_ = 0, bucket_ = 0;
  int half_ = 1;
  Owned<OrtIoBinding> binding_{nullptr, Release{}};
};

void OrtBackend::invert_stepwise(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                                 const OnStep& on_step) {
  const ModelShape& shape = bundle_.manifest.shape;
  const std::int64_t batch = branches.batch, tokens = shape.tokens(), patch_dim = shape.patch_dim();
  const bool reversed = bundle_.manifest.blocks[block].reversed;
  std::vector<float> latents(static_cast<std::size_t>(batch * shape.numbers())), found = latents;
  to_sequence(z, batch, tokens, patch_dim, reversed, latents.data());
  std::copy_n(latents.data(), batch * patch_dim, found.data());
  StepGraph graph(*this, call, block, branches);
  for (std::int64_t position = 0; position + 1 < tokens; ++position) {
    graph.step(position, found.data(), latents.data());
    on_step(position);
  }
  to_patches(found.data(), batch, tokens, patch_dim, reversed, x);
}

}  // namespace tarflow::internal
