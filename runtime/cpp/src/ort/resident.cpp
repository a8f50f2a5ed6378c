#include "ort/resident.hpp"

#include <algorithm>

#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr std::size_t kRoom = std::size_t{4} << 30;  // bytes of steps that are kept beside those in use
constexpr int kMostBegun = 256;  // steps that are begun before they are waited for: a call that is stopped ends soon
constexpr const char* kPositions[] = {"position", "position_next"};

// The next of 1, 2, 3, 4, 6, 8, 12, 16 ...: a device computes a few more as fast, and captures each size anew.
std::int64_t rounded(std::int64_t images) {
  std::int64_t power = 1;
  while (power < images) power *= 2;
  return power > 2 && images <= power * 3 / 4 ? power * 3 / 4 : power;
}

// Rows of `row` numbers, the last one repeated until there are so many.
template <class T>
std::vector<T> padded(std::vector<T> rows, std::int64_t row, std::int64_t count) {
  const std::vector<T> last(rows.end() - row, rows.end());
  while (rows.size() < size(count * row)) rows.insert(rows.end(), last.begin(), last.end());
  return rows;
}

}  // namespace

ResidentSteps::ResidentSteps(Sessions& sessions, std::int64_t batch, std::int64_t branches)
    : batch(batch), branches(branches), sessions_(sessions), shape_(sessions.bundle.manifest.shape) {
  const std::int64_t tokens = shape_.tokens(), patch_dim = shape_.patch_dim();
  const Shape cache = {batch * branches, shape_.heads(), tokens, shape_.head_dim};
  const auto held = sessions.device.touch();
  add("x", {batch, 1, tokens, patch_dim}, kFloat);
  add("z", {batch, tokens, patch_dim}, kFloat);
  add("offsets", {1}, kInt64);
  add("labels", {branches, batch}, kInt64);
  add("mix", {2, branches, tokens}, kFloat);
  add("inverse_temperature", {branches}, kFloat);
  for (const char* name : kPositions) add(name, {1}, kInt64);
  for (std::int64_t i = 0; i < 2 * shape_.layers; ++i) {
    add(cache_name(i / 2, i % 2 == 1), cache, cache_type(*sessions.bundle.manifest.precision));
  }
  sessions.holders.insert(this);
}

ResidentSteps::~ResidentSteps() {
  const auto held = sessions_.device.touch();
  if (OrtStatus* status = wait()) sessions_.library.api->ReleaseStatus(status);
  sessions_.holders.erase(this);
  bound_.clear();
  tensors_.clear();
}

void ResidentSteps::solve(const Pass& pass, const float* z, float* x, const OnStep& on_step) {
  const bool reversed = sessions_.bundle.manifest.blocks[pass.block].reversed;
  const std::int64_t numbers = shape_.numbers(), images = pass.branches.batch;
  std::vector<float> latents(size(images * numbers));
  for (std::int64_t image = 0; image < images; ++image) {  // of one image (T, 1, D) is (1, T, D)
    to_sequence(shape_, reversed, 1, z + image * numbers, latents.data() + image * numbers);
  }
  latents = padded(std::move(latents), numbers, batch);
  std::vector<std::int64_t> labels;
  for (std::int64_t g = 0; g < branches; ++g) {
    const auto first = pass.branches.classes.begin() + g * images;
    const std::vector<std::int64_t> all = padded(std::vector<std::int64_t>(first, first + images), 1, batch);
    labels.insert(labels.end(), all.begin(), all.end());
  }
  const std::int64_t start = 0;
  write("x", latents.data());  // the first patch is the latents' own, the others are written before they are read
  write("z", latents.data());
  write("labels", labels.data());
  write("mix", pass.branches.mix.data());
  write("inverse_temperature", pass.branches.inverse_temperature.data());
  write(kPositions[turn_], &start);
  for (std::int64_t position = 0; position + 1 < shape_.tokens(); ++position) {
    launch(pass);
    on_step(position);
  }
  if (pass.block > 0 && !sessions_.device.on_cpu && !sessions_.opening.one_block) {
    sessions_.get(pass.block - 1, kind(pass.block - 1));  // while the steps run
  }
  read("x", latents.data());
  for (std::int64_t image = 0; image < images; ++image) {
    to_patches(shape_, reversed, 1, latents.data() + image * numbers, x + image * numbers);
  }
}

void ResidentSteps::forget(std::size_t block, Kind kind) {
  if (kind != this->kind(block)) return;
  sessions_.library.check(wait(), "a step failed");
  for (int turn = 0; turn < 2; ++turn) bound_.erase({block, turn});
}

std::size_t ResidentSteps::bytes() const {
  std::size_t total = 0;
  for (const auto& [name, tensor] : tensors_) total += tensor.memory->size;
  return total;
}

// A tensor that is all zero: what lies in slots of a cache that are not filled yet is masked, but must be finite.
void ResidentSteps::add(const std::string& name, const Shape& shape, ONNXTensorElementDataType type) {
  const std::size_t bytes = size(count(shape)) * item_size(type);
  auto memory = std::make_unique<Buffer>(sessions_.device, bytes);
  const std::unique_ptr<std::byte[]> zeros(new std::byte[bytes]());
  sessions_.device.write(memory->address, zeros.get(), bytes);
  Owned<OrtValue> value = sessions_.tensor(memory->address, shape, type);
  tensors_.emplace(name, Tensor{std::move(memory), std::move(value)});
}

void ResidentSteps::write(const std::string& name, const void* data) {
  const auto held = sessions_.device.touch();
  sessions_.library.check(wait(), "a step failed");
  const Buffer& memory = *tensors_.at(name).memory;
  sessions_.device.write(memory.address, data, memory.size);
}

void ResidentSteps::read(const std::string& name, void* data) {
  const auto held = sessions_.device.touch();
  sessions_.library.check(wait(), "a step failed");
  const Buffer& memory = *tensors_.at(name).memory;
  sessions_.device.read(data, memory.address, memory.size);
}

// The CUDA provider's own, where the bundle has one.
Kind ResidentSteps::kind(std::size_t block) const {
  const Kind own = branches == 1 ? kCuda : kCudaGuided;
  return sessions_.device.on_cpu || sessions_.bundle.graph(block, own).empty() ? kResident : own;
}

void ResidentSteps::launch(const Pass& pass) {
  const auto held = sessions_.device.touch();
  auto found = bound_.find({pass.block, turn_});
  if (found == bound_.end()) found = bound_.emplace(std::pair(pass.block, turn_), bind(pass)).first;
  const Bound& bound = found->second;
  // A run that ended in the midst of a capture would leave the stream captured: on a device a call ends between steps.
  auto* options = sessions_.device.on_cpu ? static_cast<OrtRunOptions*>(pass.call.engine.get()) : bound.options.get();
  OrtStatus* status = sessions_.library.api->RunWithBinding(bound.session.get(), options, bound.binding.get());
  sessions_.check_run(status, pass, kind(pass.block));
  turn_ = 1 - turn_;
  if (!bound.captured) return;
  running_ = &bound;
  if (++begun_ == kMostBegun) sessions_.check_run(wait(), pass, kind(pass.block));
}

OrtStatus* ResidentSteps::wait() {
  if (begun_ == 0) return nullptr;
  begun_ = 0;
  return sessions_.library.api->SynchronizeBoundOutputs(running_->binding.get());
}

ResidentSteps::Bound ResidentSteps::bind(const Pass& pass) {
  const OrtApi* api = sessions_.library.api;
  const Kind kind = this->kind(pass.block);
  const auto accept = [&](OrtStatus* status) { sessions_.check_run(status, pass, kind); };
  const auto [session, number] = sessions_.to_capture(pass.block, kind);
  OrtRunOptions* options = nullptr;
  accept(api->CreateRunOptions(&options));
  Bound bound{session, number > 0, sessions_.library.own(options), nullptr};
  if (bound.captured) {
    accept(api->AddRunConfigEntry(options, "gpu_graph_id", text_of(number).c_str()));
    accept(api->AddRunConfigEntry(options, "disable_synchronize_execution_providers", "1"));
  }
  OrtIoBinding* binding = nullptr;
  accept(api->CreateIoBinding(session.get(), &binding));
  bound.binding = sessions_.library.own(binding);
  for (const auto& [name, tensor] : tensors_) {
    if (name == kPositions[0] || name == kPositions[1] || (name == "offsets" && kind != kResident)) continue;
    accept(api->BindInput(binding, name.c_str(), tensor.value.get()));
    const bool state = name == "x" || name.rfind("key_", 0) == 0 || name.rfind("value_", 0) == 0;
    if (state) accept(api->BindOutput(binding, (name + "_next").c_str(), tensor.value.get()));
  }
  accept(api->BindInput(binding, kPositions[0], tensors_.at(kPositions[turn_]).value.get()));
  accept(api->BindOutput(binding, kPositions[1], tensors_.at(kPositions[1 - turn_]).value.get()));
  return bound;
}

std::unique_ptr<ResidentSteps> IdleSteps::take(Sessions& sessions, std::int64_t batch, std::int64_t branches) {
  std::unique_ptr<ResidentSteps> found;
  std::list<std::unique_ptr<ResidentSteps>> dropped;  // behind the lock
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::size_t held = 0;
    for (auto at = free_.begin(); at != free_.end();) {
      const auto next = std::next(at);
      if ((*at)->batch == batch && (*at)->branches == branches) {
        if (!found) found = std::move(*at), free_.erase(at);
      } else if ((held += (*at)->bytes()) > kRoom) {
        dropped.splice(dropped.end(), free_, at);
      }
      at = next;
    }
  }
  dropped.clear();  // before there are more
  return found ? std::move(found) : std::make_unique<ResidentSteps>(sessions, batch, branches);
}

void IdleSteps::give(std::unique_ptr<ResidentSteps> steps) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_front(std::move(steps));
}

void solve_resident(Sessions& sessions, IdleSteps& idle, const Pass& pass, const float* z, float* x,
                    const OnStep& on_step) {
  const std::int64_t batch = sessions.device.on_cpu ? pass.branches.batch : rounded(pass.branches.batch);
  auto steps = idle.take(sessions, batch, pass.branches.count);
  steps->solve(pass, z, x, on_step);
  // What is not finite shows in the patch it leads to. Masked or not, it must not stay in the cache.
  const bool clean = finite(x, pass.branches.batch * sessions.bundle.manifest.shape.numbers());
  if (clean && !sessions.opening.one_block) idle.give(std::move(steps));
}

}  // namespace tarflow::internal
