#include "ort.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "error.hpp"
#include "ort_tensors.hpp"

namespace tarflow::internal {
namespace {

constexpr std::uint32_t kApi = 21;  // the oldest table of functions that has all we call; newer libraries offer it
constexpr std::int64_t kActivations = std::int64_t{1} << 30;  // bytes that forward and gradient may hold at once

ONNXTensorElementDataType cache_type(const std::string& precision) {
  if (precision == "fp16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  return precision == "bf16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : kFloat;
}

const char* provider_name(const std::string& provider) {
  return provider == "cuda" ? "CUDAExecutionProvider" : "CPUExecutionProvider";
}

// The library stays loaded: ONNX Runtime's threads and registries do not survive being unloaded.
const OrtApiBase* load(const std::string& chosen) {
  std::vector<std::string> names = {"libonnxruntime.so.1", "libonnxruntime.so"};
  const char* environment = std::getenv("TARFLOW_ONNXRUNTIME");
  if (!chosen.empty()) {
    names = {chosen};
  } else if (environment != nullptr && *environment != '\0') {
    names = {environment};
  }
  std::string reason;
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      if (reason.empty()) reason = dlerror();
      continue;
    }
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    if (base != nullptr) return base();
    throw machine_error("'" + name + "' is not ONNX Runtime: it has no OrtGetApiBase");
  }
  throw machine_error("ONNX Runtime cannot be loaded (" + reason + "); install libonnxruntime, or name the file with " +
                      "TARFLOW_ONNXRUNTIME=.../libonnxruntime.so (pip's onnxruntime holds it in onnxruntime/capi)");
}

}  // namespace

OrtBackend::OrtBackend(const Bundle& bundle, const EngineOptions& options)
    : bundle_(bundle),
      options_(options),
      resident_(options.resident || options.provider != "cpu"),
      cache_type_(cache_type(bundle.manifest.precision)),
      cache_item_(item_size(cache_type_)) {
  if (bundle.manifest.precision == "bf16" && options.provider == "cpu") {
    throw machine_error(
        "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with provider cuda, or "
        "export for this machine: tarflow export CHECKPOINT --engine fp32");
  }
  if (resident_ && !bundle.has(kResident)) {
    throw bundle_error("'" + bundle.folder +
                       "' was exported before there were graphs for devices, and runs on CPUs alone; use provider cpu, "
                       "or export it again: its weights are a checkpoint");
  }
  const OrtApiBase* base = load(options.library);
  version_ = base->GetVersionString();
  api_ = base->GetApi(kApi);
  if (api_ == nullptr) {
    throw machine_error("this is ONNX Runtime " + version_ + "; 1." + std::to_string(kApi) + " or newer is needed");
  }
  char** available = nullptr;
  int found = 0;
  check(api_->GetAvailableProviders(&available, &found), "its providers cannot be listed");
  std::string all;
  bool has = false;
  for (int i = 0; i < found; ++i) {
    all += (i ? ", " : "") + std::string(available[i]);
    has |= std::strcmp(available[i], provider_name(options.provider)) == 0;
  }
  check(api_->ReleaseAvailableProviders(available, found), "its providers cannot be listed");
  if (!has) {
    throw machine_error("provider '" + options.provider + "' needs " + provider_name(options.provider) +
                        "; this ONNX Runtime " + version_ + " has " + all + ". Use a build for GPUs, or provider cpu");
  }
  OrtEnv* environment = nullptr;
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "tarflow", &environment), "it does not start");
  environment_ = own(environment);
  OrtMemoryInfo* host = nullptr;
  check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &host), "it has no memory");
  host_ = own(host);
  if (options.provider != "cpu") session(0, kForward);  // fails here and now if the provider does not start
}

OrtBackend::~OrtBackend() = default;

std::string OrtBackend::description() const {
  const std::string name = provider_name(options_.provider);
  return "ONNX Runtime " + version_ + ", " + name.substr(0, name.find("Execution"));
}

void OrtBackend::prepare(Call& call) const {
  OrtRunOptions* options = nullptr;
  check(api_->CreateRunOptions(&options), "it has no memory");
  const std::shared_ptr<OrtRunOptions> shared(options, Release{api_});
  call.engine = shared;
  const auto ignore = [api = api_](OrtStatus* status) {  // it only sets a flag
    if (status != nullptr) api->ReleaseStatus(status);
  };
  call.interrupt = [api = api_, options, ignore] { ignore(api->RunOptionsSetTerminate(options)); };
  call.resume = [api = api_, options, ignore] { ignore(api->RunOptionsUnsetTerminate(options)); };
}

void OrtBackend::check(OrtStatus* status, const std::string& what) const {
  if (status == nullptr) return;
  const std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  throw machine_error("ONNX Runtime " + version_ + ": " + what + " (" + message.substr(0, 300) + ")");
}

void OrtBackend::failed(std::size_t block, Kind kind, const std::string& message) const {
  const std::string where = "block " + std::to_string(block) + "'s " + kKindNames[kind] + " graph";
  if (message.find("llocate") != std::string::npos) {
    throw machine_error("out of memory in " + where + "; use a smaller batch size, or low_memory");
  }
  throw bundle_error(where + " failed in " + description() + ": " +
                     message.substr(0, message.find('\n')).substr(0, 300));
}

void OrtBackend::check_run(Call& call, OrtStatus* status, std::size_t block, Kind kind) const {
  if (status == nullptr) return;
  const std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  if (call.cancelled()) throw Cancelled();
  failed(block, kind, message);
}

OrtBackend::Session OrtBackend::session(std::size_t block, Kind kind) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (options_.low_memory) {  // sessions in use elsewhere live on until their users let go of them
    for (auto at = sessions_.begin(); at != sessions_.end();) {
      at = at->first.first == block ? std::next(at) : sessions_.erase(at);
    }
  }
  Session& found = sessions_[{block, kind}];
  if (!found) found = open(block, kind);
  return found;
}

OrtBackend::Session OrtBackend::open(std::size_t block, Kind kind) const {
  OrtSessionOptions* made = nullptr;
  check(api_->CreateSessionOptions(&made), "it has no memory");
  const Owned<OrtSessionOptions> options = own(made);
  const auto entry = [&](const char* key, const char* value) {
    check(api_->AddSessionConfigEntry(made, key, value), std::string("it refuses ") + key);
  };
  check(api_->SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), "it refuses a log level");
  check(api_->SetInterOpNumThreads(made, 1), "it refuses one thread");
  if (options_.threads > 0) check(api_->SetIntraOpNumThreads(made, options_.threads), "it refuses the threads");
  if (!options_.spinning) entry("session.intra_op.allow_spinning", "0");
  // Blocks run one after the other: the last one's idle threads must not take a core from this one's.
  if (options_.spinning) entry("session.force_spinning_stop", "1");
  // Prepacking copies the weights of every session. It pays only where a graph runs once a step.
  const bool stepping = kind == kStep || kind == kResident;
  if (!stepping) entry("session.disable_prepacking", "1");
  if (bundle_.manifest.precision == "int8") {  // steps multiply in int8; what judges them does not
    entry("session.qdq_matmulnbits_accuracy_level", stepping ? "4" : "1");
    entry("session.qdq_matmulnbits_block_size", "64");
  }
  append_provider(made);
  const std::string path = bundle_.graph(block, kind);
  OrtSession* session = nullptr;
  OrtStatus* status = api_->CreateSession(environment_.get(), path.c_str(), made, &session);
  if (status != nullptr) {
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    const bool memory = message.find("llocat") != std::string::npos || message.find("bad_alloc") != std::string::npos;
    const bool device = options_.provider != "cpu" &&
                        (message.find("CUDA") != std::string::npos || message.find("rovider") != std::string::npos);
    throw Error(memory || device ? TARFLOW_MACHINE : TARFLOW_BUNDLE,
                "'" + path + "' cannot be loaded by " + description() + ": " + message.substr(0, 300));
  }
  return Session(session, Release{api_});
}

void OrtBackend::append_provider(OrtSessionOptions* options) const {
  if (options_.provider == "cpu") return;
  OrtCUDAProviderOptionsV2* made = nullptr;
  check(api_->CreateCUDAProviderOptions(&made), "its CUDA provider does not start");
  const auto provider = own(made);
  // By default fp32's products would round what they multiply to 10 bits of mantissa.
  const char* const key = "use_tf32";
  const char* const value = "0";
  check(api_->UpdateCUDAProviderOptions(made, &key, &value, 1), "its CUDA provider has no use_tf32");
  check(api_->SessionOptionsAppendExecutionProvider_CUDA_V2(options, made), "its CUDA provider does not start");
}

Owned<OrtValue> OrtBackend::tensor(void* data, const Shape& shape, ONNXTensorElementDataType type) const {
  OrtValue* value = nullptr;
  const std::size_t bytes = static_cast<std::size_t>(count(shape)) * item_size(type);
  check(api_->CreateTensorWithDataAsOrtValue(host_.get(), data, bytes, shape.data(), shape.size(), type, &value),
        "it refuses a tensor");
  return own(value);
}

void OrtBackend::run(Call& call, std::size_t block, Kind kind, const std::vector<Place>& inputs,
                     const std::vector<Place>& outputs) {
  const Session session = this->session(block, kind);
  std::vector<Owned<OrtValue>> owned;
  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> in;
  std::vector<OrtValue*> out;
  for (const Place& place : inputs) {
    owned.push_back(tensor(place.data, place.shape, place.type));
    input_names.push_back(place.name);
    in.push_back(owned.back().get());
  }
  for (const Place& place : outputs) {
    owned.push_back(tensor(place.data, place.shape, place.type));
    output_names.push_back(place.name);
    out.push_back(owned.back().get());
  }
  auto* options = static_cast<OrtRunOptions*>(call.engine.get());
  check_run(call,
            api_->Run(session.get(), options, input_names.data(), in.data(), in.size(), output_names.data(), out.size(),
                      out.data()),
            block, kind);
}

std::int64_t OrtBackend::rows_that_fit(std::int64_t attention, std::int64_t hidden) const {
  const ModelShape& shape = bundle_.manifest.shape;
  const double row = 4.0 * double(shape.tokens()) *
                     (double(attention * shape.heads()) * double(shape.tokens()) + double(hidden * shape.width));
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(double(kActivations) / row));
}

// Graph inputs are never written to, though the C API takes them as void*.
template <class T>
void* readable(const T* data) {
  return const_cast<T*>(data);
}

void OrtBackend::forward(Call& call, std::size_t block, const float* x, const Branches& branches, float* z,
                         float* log_det) {
  const ModelShape& shape = bundle_.manifest.shape;
  const std::int64_t tokens = shape.tokens(), patch_dim = shape.patch_dim(), branch_count = branches.count;
  const std::int64_t most = rows_that_fit(3 * branch_count, 12 * branch_count);
  for (std::int64_t start = 0; start < branches.batch; start += most) {
    if (call.cancelled()) throw Cancelled();
    const std::int64_t rows = std::min(most, branches.batch - start), offset = start * shape.numbers();
    std::vector<std::int64_t> labels;
    for (std::int64_t g = 0; g < branch_count; ++g) {
      const auto first = branches.labels.begin() + g * branches.batch + start;
      labels.insert(labels.end(), first, first + rows);
    }
    run(call, block, kForward,
        {{"x", readable(x + offset), {rows, tokens, patch_dim}, kFloat},
         {"labels", labels.data(), {branch_count, rows}, kInt64},
         {"mix", readable(branches.mix.data()), {2, branch_count, tokens}, kFloat},
         {"inverse_temperature", readable(branches.inverse_temperature.data()), {branch_count}, kFloat}},
        {{"z", z + offset, {rows, tokens, patch_dim}, kFloat}, {"log_det", log_det + start, {rows}, kFloat}});
  }
}

void OrtBackend::gradient(Call& call, std::size_t block, const float* x, const Branches& branches, float* grad) {
  const ModelShape& shape = bundle_.manifest.shape;
  const std::int64_t tokens = shape.tokens(), patch_dim = shape.patch_dim();
  const std::int64_t most = rows_that_fit(shape.layers + 4, 12 * (shape.layers + 1));
  std::vector<float> ones(static_cast<std::size_t>(std::min(most, branches.batch)), 1.0F), found;
  for (std::int64_t start = 0; start < branches.batch; start += most) {
    if (call.cancelled()) throw Cancelled();
    const std::int64_t rows = std::min(most, branches.batch - start), offset = start * shape.numbers();
    found.resize(static_cast<std::size_t>(rows * shape.numbers()));
    run(call, block, kGradient,
        {{"x", readable(x + offset), {rows, tokens, patch_dim}, kFloat},
         {"labels", readable(branches.labels.data() + start), {1, rows}, kInt64},
         {"grad_z", grad + offset, {rows, tokens, patch_dim}, kFloat},
         {"grad_log_det", ones.data(), {rows}, kFloat}},
        {{"grad_x", found.data(), {rows, tokens, patch_dim}, kFloat}});
    std::copy(found.begin(), found.end(), grad + offset);
  }
}

void OrtBackend::invert(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                        const OnStep& on_step) {
  if (bundle_.manifest.shape.tokens() == 1) {
    std::copy_n(z, branches.batch * bundle_.manifest.shape.numbers(), x);
  } else if (resident_) {
    invert_resident(call, block, z, branches, x, on_step);
  } else {
    invert_stepwise(call, block, z, branches, x, on_step);
  }
}

}  // namespace tarflow::internal
