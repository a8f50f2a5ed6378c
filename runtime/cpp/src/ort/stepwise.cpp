// Decoding with the step graph, whose cache is the host's.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ort/stepwise.hpp"
#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr float kMasked = -1e30F;  // exp() of it is exactly 0

// Its cache is read only: this class stores the new keys and values. Every buffer is allocated before the loop of
// steps, but for the cache, which grows in buckets, so that early steps do not pay for empty slots.
class StepGraph {
 public:
  StepGraph(Sessions& sessions, const Pass& pass)
      : sessions_(sessions),
        pass_(pass),
        shape_(sessions.bundle.manifest.shape),
        session_(sessions.get(pass.block, kStep)),
        reversed_(sessions.bundle.manifest.blocks[pass.block].reversed),
        batch_(pass.branches.batch),
        rows_(pass.branches.batch * pass.branches.count),
        outputs_(shape_.patch_dim() * (shape_.nvp ? 2 : 1)),
        heads_(2 * shape_.layers * rows_ * shape_.heads()),
        item_(size(shape_.head_dim) * sessions.bundle.manifest.precision->cache_bytes),
        x_in_(size(batch_ * shape_.patch_dim())),
        z_in_(x_in_.size()),
        x_out_(x_in_.size()),
        mix_(size(pass.branches.count * batch_ * outputs_)),
        labels_(pass.branches.classes),
        index_(size(batch_)),
        mix_varies_(varies(pass.branches, shape_.tokens())),
        fresh_(new std::byte[size(heads_) * item_]) {
    const auto root = static_cast<float>(std::sqrt(static_cast<float>(shape_.head_dim)));
    for (const float inverse : pass.branches.inverse_temperature) {
      query_scale_.insert(query_scale_.end(), size(batch_), inverse / root);
    }
    fill_mix(0);
    reserve();
  }

  // x and z (T, B, D) in block order; x is known up to `position`.
  void step(std::int64_t position, float* x, const float* z) {
    if (position == capacity_) grow();
    const std::int64_t patch = batch_ * shape_.patch_dim();
    if (position > 0) bias_[size(position - 1)] = 0;
    std::copy_n(x + position * patch, patch, x_in_.data());
    std::copy_n(z + (position + 1) * patch, patch, z_in_.data());
    std::fill(index_.begin(), index_.end(), reversed_ ? shape_.tokens() - 1 - position : position);
    if (mix_varies_) fill_mix(position);
    auto* options = static_cast<OrtRunOptions*>(pass_.call.engine.get());
    accept(sessions_.library.api->RunWithBinding(session_.get(), options, binding_.get()));
    for (std::int64_t head = 0; head < heads_; ++head) {
      std::memcpy(cache_ + size(head * capacity_ + position) * item_, fresh_.get() + size(head) * item_, item_);
    }
    std::copy_n(x_out_.data(), patch, x + (position + 1) * patch);
  }

 private:
  // Whether a branch's weights change along the sequence.
  static bool varies(const Branches& branches, std::int64_t tokens) {
    for (auto row = branches.mix.begin(); row != branches.mix.end(); row += tokens) {
      if (!std::all_of(row, row + tokens, [&](float weight) { return weight == *row; })) return true;
    }
    return false;
  }

  // (G, B, outputs): each branch's weight of log_scale, then of shift, at this step.
  void fill_mix(std::int64_t position) {
    const Branches& branches = pass_.branches;
    const std::int64_t tokens = shape_.tokens(), parts = shape_.nvp ? 2 : 1;
    float* to = mix_.data();
    for (std::int64_t g = 0; g < branches.count; ++g) {
      for (std::int64_t b = 0; b < batch_; ++b) {
        for (std::int64_t part = 2 - parts; part < 2; ++part) {
          to = std::fill_n(to, shape_.patch_dim(), branches.mix[size((part * branches.count + g) * tokens + position)]);
        }
      }
    }
  }

  // Memory for all slots, twice: the cache grows from one half into the other. What a block before left will do.
  void reserve() {
    Call& call = pass_.call;
    const std::size_t whole = size(heads_ * shape_.tokens()) * item_;
    for (int half = 0; half < 2; ++half) {
      if (call.memory_size[half] == whole) continue;
      call.memory_size[half] = 0;
      call.memory[half].reset();  // before there are two
      call.memory[half].reset(new std::byte[whole]);
      call.memory_size[half] = whole;
    }
  }

  // Room for another bucket of slots. Larger buckets make attention read more empty slots, smaller ones copy the cache
  // more often.
  void grow() {
    const auto bucket = 16 * static_cast<std::int64_t>(std::ceil(std::sqrt(3.0 * double(shape_.tokens())) / 16));
    const std::int64_t grown = std::min(shape_.tokens(), capacity_ + bucket);
    half_ = 1 - half_;
    std::byte* cache = pass_.call.memory[half_].get();
    const std::size_t known = size(capacity_) * item_;
    for (std::int64_t head = 0; head < heads_; ++head) {
      std::byte* to = cache + size(head * grown) * item_;
      if (known > 0) std::memcpy(to, cache_ + size(head * capacity_) * item_, known);
      std::memset(to + known, 0, size(grown - capacity_) * item_);  // masked, but must be finite
    }
    std::vector<float> bias(size(grown + 1), kMasked);
    std::fill_n(bias.begin(), std::max<std::int64_t>(0, capacity_ - 1), 0.0F);
    bias.back() = 0;  // the window's own patch
    bias_ = std::move(bias);
    cache_ = cache;
    capacity_ = grown;
    bind();
  }

  void bind() {
    OrtIoBinding* made = nullptr;
    sessions_.library.check(sessions_.library.api->CreateIoBinding(session_.get(), &made), "it binds nothing");
    binding_ = sessions_.library.own(made);
    const std::int64_t patch_dim = shape_.patch_dim(), heads = shape_.heads(), head_dim = shape_.head_dim;
    const std::int64_t branches = pass_.branches.count;
    const auto type = cache_type(*sessions_.bundle.manifest.precision);
    bind_input("x", x_in_.data(), {batch_, patch_dim}, kFloat);
    bind_input("z", z_in_.data(), {batch_, patch_dim}, kFloat);
    bind_input("index", index_.data(), {batch_}, kInt64);
    bind_input("labels", labels_.data(), {branches, batch_}, kInt64);
    bind_input("mix", mix_.data(), {branches, batch_, outputs_}, kFloat);
    bind_input("query_scale", query_scale_.data(), {rows_, 1, 1, 1}, kFloat);
    bind_input("bias", bias_.data(), {1, capacity_ + 1}, kFloat);
    const std::size_t part = size(rows_ * heads * capacity_) * item_;
    for (std::int64_t i = 0; i < 2 * shape_.layers; ++i) {
      bind_input(cache_name(i / 2, i % 2 == 1), cache_ + size(i) * part, {rows_, heads, capacity_, head_dim}, type);
    }
    bind_output("x_next", x_out_.data(), {batch_, patch_dim}, kFloat);
    bind_output("fresh", fresh_.get(), {2 * shape_.layers * rows_, heads, 1, head_dim}, type);
  }

  // The binding keeps the tensors.
  void bind_input(const std::string& name, void* data, const Shape& shape, ONNXTensorElementDataType type) {
    const Owned<OrtValue> value = sessions_.library.tensor(data, shape, type);
    accept(sessions_.library.api->BindInput(binding_.get(), name.c_str(), value.get()));
  }

  void bind_output(const char* name, void* data, const Shape& shape, ONNXTensorElementDataType type) {
    const Owned<OrtValue> value = sessions_.library.tensor(data, shape, type);
    accept(sessions_.library.api->BindOutput(binding_.get(), name, value.get()));
  }

  void accept(OrtStatus* status) const { sessions_.check_run(status, pass_, kStep); }

  Sessions& sessions_;
  const Pass& pass_;
  const ModelShape& shape_;
  const Session session_;
  const bool reversed_;
  const std::int64_t batch_, rows_, outputs_, heads_;  // heads: of all layers, keys and values
  const std::size_t item_;                             // bytes of one head's key or value
  std::vector<float> x_in_, z_in_, x_out_, mix_, query_scale_, bias_;
  std::vector<std::int64_t> labels_, index_;
  const bool mix_varies_;
  const std::unique_ptr<std::byte[]> fresh_;
  std::byte* cache_ = nullptr;  // (2 * layers, R, H, capacity, d)
  std::int64_t capacity_ = 0;
  int half_ = 1;
  Owned<OrtIoBinding> binding_;
};

}  // namespace

void solve_stepwise(Sessions& sessions, const Pass& pass, const float* z, float* x, const OnStep& on_step) {
  const ModelShape& shape = sessions.bundle.manifest.shape;
  const bool reversed = sessions.bundle.manifest.blocks[pass.block].reversed;
  const std::int64_t batch = pass.branches.batch;
  std::vector<float> latents(size(batch * shape.numbers())), found = latents;
  to_sequence(shape, reversed, batch, z, latents.data());
  std::copy_n(latents.data(), batch * shape.patch_dim(), found.data());
  StepGraph graph(sessions, pass);
  for (std::int64_t position = 0; position + 1 < shape.tokens(); ++position) {
    graph.step(position, found.data(), latents.data());
    on_step(position);
  }
  to_patches(shape, reversed, batch, found.data(), x);
}

}  // namespace tarflow::internal
