#include "native/backend.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "error.hpp"
#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr int kMostThreads = 64;
constexpr auto kLongest = std::chrono::milliseconds(50);  // of steps in one call: how long a cancellation may wait

std::int32_t number_of(const std::string& precision) {
  if (precision == "int16") return TARFLOW_NATIVE_INT16;
  if (precision == "bf16") return TARFLOW_NATIVE_BF16;
  return precision == "int8" ? TARFLOW_NATIVE_INT8 : TARFLOW_NATIVE_FP32;
}

int threads_of(int asked) {
  const int cores = static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
  if (asked > kMostThreads) throw field_error("threads", asked, "1 to 64 on the native engine, or 0 for one a core");
  return std::min(asked > 0 ? asked : cores, kMostThreads);
}

const char* isa() {
  const char* name = tarflow_native_isa();
  if (name == nullptr) throw input_error(tarflow_native_message());
  return name;
}

// What weights are kept in: what was asked for, or what suits what was exported.
std::string precision_of(const Manifest& manifest, const std::string& asked) {
  if (!asked.empty()) return asked;
  return manifest.precision->int8 ? "int8" : "fp32";
}

tarflow_native_shape shape_of(const ModelShape& shape) {
  return {shape.tokens(), shape.patch_dim(), shape.width,   shape.head_dim,
          shape.layers,   shape.blocks,      shape.classes, shape.nvp ? 1 : 0};
}

// Throws what a function's code means; `where` says which of them it was.
void check(int code, const std::string& where) {
  if (code == TARFLOW_NATIVE_OK) return;
  const std::string message = where + ": " + tarflow_native_message();
  if (code == TARFLOW_NATIVE_WRONG) throw bundle_error(message + "; copy the bundle again, or export it again");
  if (code == TARFLOW_NATIVE_MEMORY) {
    throw machine_error(message + "; use a smaller `batch_size`, fewer `threads`, or `low_memory`");
  }
  throw Error(TARFLOW_DEFECT, message);
}

// Patch order to block order, or back: backwards if the block is reversed.
void reorder(const ModelShape& shape, bool reversed, std::int64_t batch, const float* from, float* to) {
  const std::int64_t tokens = shape.tokens(), patch_dim = shape.patch_dim();
  for (std::int64_t b = 0; b < batch; ++b, from += shape.numbers(), to += shape.numbers()) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::copy_n(from + (reversed ? tokens - 1 - t : t) * patch_dim, patch_dim, to + t * patch_dim);
    }
  }
}

}  // namespace

std::string why_not_native(const Manifest& manifest) {
  if (!manifest.precision->on_cpus) return "its certificate needs products that ONNX Runtime has not got on CPUs";
  isa();
  if (const char* slower = tarflow_native_slower()) return slower;
  if (precision_of(manifest, "") != "int8" || manifest.vouched_int8) return "";
  return "the bundle's parity card has no row within tolerance for native int8; an export writes one";
}

NativeBackend::NativeBackend(const Bundle& bundle, const Opening& opening)
    : bundle_(bundle),
      shape_(bundle.manifest.shape),
      precision_(precision_of(bundle.manifest, opening.precision)),
      threads_(threads_of(opening.threads)),
      graphs_(bundle, Opening(opening, "cpu"), false),
      weights_(bundle.weights()) {
  isa();
  const tarflow_native_shape shape = shape_of(shape_);
  const std::vector<std::int32_t> precisions(size(shape_.blocks), number_of(precision_));
  tarflow_native_model* made = nullptr;
  check(tarflow_native_open(weights_.data(), weights_.size(), &shape, precisions.data(), threads_,
                            opening.one_block ? 1 : 0, &made),
        "'" + bundle.path(kWeights) + "'");
  model_.reset(made);
}

void NativeBackend::invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) {
  const Branches& branches = pass.branches;
  const bool reversed = bundle_.manifest.blocks[pass.block].reversed;
  const std::string where = "block " + text_of(pass.block) + "'s native decoding";
  std::vector<float> latents(size(branches.batch * shape_.numbers()));
  reorder(shape_, reversed, branches.batch, z, latents.data());
  std::vector<std::int64_t> labels = branches.classes;
  for (std::int64_t& label : labels) label = label < shape_.classes ? label : -1;
  const tarflow_native_batch batch = {branches.batch, branches.count,      latents.data(),
                                      labels.data(),  branches.mix.data(), branches.inverse_temperature.data()};
  tarflow_native_decoding* made = nullptr;
  const int code = tarflow_native_begin(model_.get(), static_cast<std::int64_t>(pass.block), &batch, &made);
  const std::unique_ptr<tarflow_native_decoding, void (*)(tarflow_native_decoding*)> decoding(made, tarflow_native_end);
  bundle_.weights().require_unchanged();  // after they were read, so that what was read is what was hashed
  check(code, where);
  std::int64_t together = 1;  // steps in one call
  for (std::int64_t position = 0, end = 0; end + 1 < shape_.tokens();) {
    end = std::min(position + together, shape_.tokens() - 1);
    const auto begun = std::chrono::steady_clock::now();
    check(tarflow_native_run(decoding.get(), position, end), where);
    if (2 * (std::chrono::steady_clock::now() - begun) < kLongest) together *= 2;
    for (; position < end; ++position) on_step(position);
  }
  reorder(shape_, reversed, branches.batch, tarflow_native_x(decoding.get()), x);
}

std::string NativeBackend::description() const {
  return "native " + precision_ + " (" + isa() + "), " + text_of(threads_) + (threads_ == 1 ? " thread" : " threads");
}

}  // namespace tarflow::internal
