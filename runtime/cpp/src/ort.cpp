#include "ort.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "error.hpp"

namespace tarflow::internal {
namespace {

constexpr std::uint32_t kApi = 21;  // the oldest table of functions that has all we call; newer libraries offer it
constexpr float kMasked = -1e30F;   // exp() of it is exactly 0
constexpr std::int64_t kActivations = std::int64_t{1} << 30;  // bytes that forward and gradient may hold at once
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

using Shape = std::vector<std::int64_t>;

std::int64_t count(const Shape& shape) {
  std::int64_t total = 1;
  for (const std::int64_t size : shape) total *= size;
  return total;
}

std::size_t item_size(ONNXTensorElementDataType type) { return type == kInt64 ? 8 : type == kFloat ? 4 : 2; }

ONNXTensorElementDataType cache_type(const std::string& precision) {
  if (precision == "fp16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  return precision == "bf16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : kFloat;
}

const char* provider_name(const std::string& provider) {
  if (provider == "cuda") return "CUDAExecutionProvider";
  return provider == "ort-tensorrt" ? "TensorrtExecutionProvider" : "CPUExecutionProvider";
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

// (B, T, D) or rows of it, patch order to block order and back, sequence first: (T, B, D).
void to_sequence(const float* patches, std::int64_t batch, std::int64_t tokens, std::int64_t patch_dim, bool reversed,
                 float* sequence) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t from = reversed ? tokens - 1 - t : t;
      std::memcpy(sequence + (t * batch + b) * patch_dim, patches + (b * tokens + from) * patch_dim,
                  static_cast<std::size_t>(patch_dim) * sizeof(float));
    }
  }
}

void to_patches(const float* sequence, std::int64_t batch, std::int64_t tokens, std::int64_t patch_dim, bool reversed,
                float* patches) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t to = reversed ? tokens - 1 - t : t;
      std::memcpy(patches + (b * tokens + to) * patch_dim, sequence + (t * batch + b) * patch_dim,
                  static_cast<std::size_t>(patch_dim) * sizeof(float));
    }
  }
}

std::string cache_name(std::int64_t layer, bool value) { return (value ? "value_" : "key_") + std::to_string(layer); }

}  // namespace

OrtBackend::OrtBackend(const Bundle& bundle, const EngineOptions& options)
    : bundle_(bundle),
      options_(options),
      resident_((options.resident || options.provider != "cpu") && bundle.has(kResident)),
      cache_type_(cache_type(bundle.manifest.precision)),
      cache_item_(item_size(cache_type_)) {
  if (bundle.manifest.precision == "bf16" && options.provider == "cpu") {
    throw machine_error(
        "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with provider cuda, or "
        "export for this machine: tarflow export CHECKPOINT --engine fp32");
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
  const bool old = options_.provider != "cpu" && !resident_;
  return "ONNX Runtime " + version_ + ", " + name.substr(0, name.find("Execution")) +
         (old ? ", cache on the host: an old bundle" : "");
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
  if (options_.provider == "ort-tensorrt") {
    OrtTensorRTProviderOptionsV2* made = nullptr;
    check(api_->CreateTensorRTProviderOptions(&made), "its TensorRT provider does not start");
    const auto provider = own(made);
    check(api_->SessionOptionsAppendExecutionProvider_TensorRT_V2(options, made),
          "its TensorRT provider does not start");
  }
  if (options_.provider != "cpu") {
    OrtCUDAProviderOptionsV2* made = nullptr;
    check(api_->CreateCUDAProviderOptions(&made), "its CUDA provider does not start");
    const auto provider = own(made);
    check(api_->SessionOptionsAppendExecutionProvider_CUDA_V2(options, made), "its CUDA provider does not start");
  }
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
