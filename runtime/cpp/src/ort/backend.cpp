#include "ort/backend.hpp"

#include <algorithm>

#include "error.hpp"
#include "ort/stepwise.hpp"

namespace tarflow::internal {
namespace {

constexpr double kActivations = 0x1p30;  // bytes that forward and gradient may hold at once

// The bundle, if it runs there at all.
const Bundle& checked(const Bundle& bundle, const Opening& opening, bool resident) {
  if (opening.on_cpu() && !bundle.manifest.precision->on_cpus) {
    throw machine_error(
        "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with `provider` cuda, or "
        "export it for this machine, in fp32");
  }
  if (resident && !bundle.has(kResident)) {
    throw bundle_error("'" + bundle.folder +
                       "' was exported before there were graphs for devices, and runs on CPUs alone; use `provider` "
                       "cpu, or export it again: its weights are a checkpoint");
  }
  return bundle;
}

// Graph inputs are never written to, though the C API takes them as void*.
template <class T>
void* readable(const T* data) {
  return const_cast<T*>(data);
}

}  // namespace

OrtBackend::OrtBackend(const Bundle& bundle, const Opening& opening, bool resident)
    : shape_(bundle.manifest.shape), resident_(resident), sessions_(checked(bundle, opening, resident), opening) {
  if (!opening.on_cpu()) sessions_.get(0, kForward);  // fails here and now if the provider does not start
}

void OrtBackend::prepare(Call& call) const {
  const OrtApi* api = sessions_.library.api;
  OrtRunOptions* options = nullptr;
  sessions_.library.check(api->CreateRunOptions(&options), "it has no memory");
  call.engine = std::shared_ptr<OrtRunOptions>(options, Release{api});
  if (!sessions_.device.on_cpu) {  // scratch memory is given back: each session would keep the most it ever had
    const std::string where = "gpu:" + text_of(sessions_.device.number);
    sessions_.library.check(
        api->AddRunConfigEntry(options, "memory.enable_memory_arena_shrinkage", where.c_str()), "it keeps memory");
  }
  const auto ignore = [api](OrtStatus* status) {  // it only sets a flag
    if (status != nullptr) api->ReleaseStatus(status);
  };
  call.interrupt = [api, options, ignore] { ignore(api->RunOptionsSetTerminate(options)); };
  call.resume = [api, options, ignore] { ignore(api->RunOptionsUnsetTerminate(options)); };
}

void OrtBackend::invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) {
  if (shape_.tokens() == 1) {
    std::copy_n(z, pass.branches.batch * shape_.numbers(), x);
  } else if (resident_) {
    solve_resident(sessions_, idle_, pass, z, x, on_step);
  } else {
    solve_stepwise(sessions_, pass, z, x, on_step);
  }
}

void OrtBackend::forward(const Pass& pass, const float* x, float* z, float* log_det) {
  const Branches& branches = pass.branches;
  const std::int64_t tokens = shape_.tokens(), patch_dim = shape_.patch_dim(), count = branches.count;
  const std::int64_t most = rows_that_fit(3 * count, 12 * count);
  for (std::int64_t start = 0; start < branches.batch; start += most) {
    pass.call.check();
    const std::int64_t rows = std::min(most, branches.batch - start), offset = start * shape_.numbers();
    std::vector<std::int64_t> labels;
    for (std::int64_t g = 0; g < count; ++g) {
      const auto first = branches.classes.begin() + g * branches.batch + start;
      labels.insert(labels.end(), first, first + rows);
    }
    sessions_.run(pass, kForward,
                  {{"x", readable(x + offset), {rows, tokens, patch_dim}, kFloat},
                   {"labels", labels.data(), {count, rows}, kInt64},
                   {"mix", readable(branches.mix.data()), {2, count, tokens}, kFloat},
                   {"inverse_temperature", readable(branches.inverse_temperature.data()), {count}, kFloat}},
                  {{"z", z + offset, {rows, tokens, patch_dim}, kFloat}, {"log_det", log_det + start, {rows}, kFloat}});
  }
}

void OrtBackend::gradient(const Pass& pass, const float* x, float* grad) {
  const Branches& branches = pass.branches;
  const std::int64_t tokens = shape_.tokens(), patch_dim = shape_.patch_dim();
  const std::int64_t most = rows_that_fit(shape_.layers + 4, 12 * (shape_.layers + 1));
  std::vector<float> ones(static_cast<std::size_t>(std::min(most, branches.batch)), 1.0F), found;
  for (std::int64_t start = 0; start < branches.batch; start += most) {
    pass.call.check();
    const std::int64_t rows = std::min(most, branches.batch - start), offset = start * shape_.numbers();
    found.resize(static_cast<std::size_t>(rows * shape_.numbers()));
    sessions_.run(pass, kGradient,
                  {{"x", readable(x + offset), {rows, tokens, patch_dim}, kFloat},
                   {"labels", readable(branches.classes.data() + start), {1, rows}, kInt64},
                   {"grad_z", grad + offset, {rows, tokens, patch_dim}, kFloat},
                   {"grad_log_det", ones.data(), {rows}, kFloat}},
                  {{"grad_x", found.data(), {rows, tokens, patch_dim}, kFloat}});
    std::copy(found.begin(), found.end(), grad + offset);
  }
}

// Rows, if so many (H, T, T) and (T, C) arrays of each image live at once.
std::int64_t OrtBackend::rows_that_fit(std::int64_t attention, std::int64_t hidden) const {
  const double row = 4.0 * double(shape_.tokens()) *
                     (double(attention * shape_.heads()) * double(shape_.tokens()) + double(hidden * shape_.width));
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(kActivations / row));
}

}  // namespace tarflow::internal
