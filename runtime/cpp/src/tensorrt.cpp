// Engines that `tarflow build` made: state and cache in device memory, updated in place, one CUDA graph replays a step.
#include "tensorrt.hpp"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "built.hpp"
#include "cuda.hpp"
#include "turn.hpp"

static_assert(NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1015, "a cache in place needs TensorRT 10.15 or newer");

namespace tarflow::internal {
namespace {

namespace fs = std::filesystem;
using nvinfer1::Dims;

constexpr std::int64_t kStepsInFlight = 4;  // launched before the host waits: how late a cancellation may come

// Keeps TensorRT's errors, to be told in one exception instead of on stderr.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (said_.size() < 600) said_ += (said_.empty() ? "" : "; ") + std::string(message).substr(0, 300);
    } catch (...) {  // without memory its words are lost, its refusal is not
    }
  }

  std::string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string said = said_.empty() ? "no reason given" : std::move(said_);
    said_.clear();
    return said;
  }

 private:
  std::mutex mutex_;
  std::string said_;
};

// One input or output of an engine: where it lies, and its shape (inputs).
struct Tensor {
  std::string name;
  void* address;
  std::vector<std::int64_t> shape;
};

Here this_machine() {
  int devices = 0;
  const cudaError_t status =
      cudaGetDeviceCount(&devices);  // before any runtime: without a driver it is a bogus pointer
  if (status != cudaSuccess || devices == 0) {
    throw machine_error(std::string("no NVIDIA GPU can be used here (") + cudaGetErrorName(status) +
                        "): engines need one, with its driver; use provider cpu");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, current_device()), "describe the device");
  const int version = getInferLibVersion();  // 110400 is 11.4.0
  return {
      "tensorrt",
      std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100),
      properties.name, std::to_string(properties.major) + "." + std::to_string(properties.minor)};
}

bool is_cache(const std::string& name) { return name.rfind("key_", 0) == 0 || name.rfind("value_", 0) == 0; }

class TensorRtBackend final : public Backend {
 public:
  TensorRtBackend(const Bundle& bundle, bool low_memory, bool cuda_graph)
      : bundle_(bundle),
        shape_(bundle.manifest.shape),
        low_memory_(low_memory),
        cuda_graph_(cuda_graph),
        here_(this_machine()),
        device_(current_device()),
        built_(choose_built(bundle, here_)) {
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (!runtime_) throw machine_error("TensorRT does not start: " + logger_.take());
    runtime_->setEngineHostCodeAllowed(false);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream");
  }

  ~TensorRtBackend() override {
    int before = 0;  // nothing may be thrown here
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    loaded_.clear();
    memory_.clear();
    scratch_.reset();
    cudaStreamDestroy(stream_);
    cudaSetDevice(before);
  }

  void prepare(Call& call) const override { turns_.prepare(call); }

  std::string description() const override {
    return "TensorRT " + here_.version + " " + built_.record.precision + ", " + here_.gpu;
  }

  void invert(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
              const OnStep& on_step) override {
    const Turn turn(turns_, call);
    const OnDevice device(device_);
    const auto [number, profile] = choose_profile("step", branches.count);
    for (std::int64_t start = 0, most = profile.batch[2]; start < branches.batch; start += most) {
      const std::int64_t rows = std::min(most, branches.batch - start);
      const bool last = start + rows == branches.batch;  // the watcher counts the steps of one part alone
      const OnStep step = [&, last](std::int64_t position) {
        if (call.cancelled()) throw Cancelled();
        if (last) on_step(position);
      };
      solve(block, number, std::max(rows, profile.batch[0]), rows, start, z, branches, x, step);
    }
  }

  void forward(Call& call, std::size_t block, const float* x, const Branches& branches, float* z,
               float* log_det) override {
    const Turn turn(turns_, call);
    const OnDevice device(device_);
    const auto [number, profile] = choose_profile("forward", branches.count);
    for (std::int64_t start = 0; start < branches.batch; start += profile.batch[2]) {
      if (call.cancelled()) throw Cancelled();
      const std::int64_t rows = std::min(profile.batch[2], branches.batch - start),
                         batch = std::max(rows, profile.batch[0]);
      const std::vector<Tensor> tensors = {
          sequence("x", x, start, rows, batch), labels(branches, start, rows, batch),
          upload("mix", branches.mix, {2, branches.count, shape_.tokens()}),
          upload("inverse_temperature", branches.inverse_temperature, {branches.count})};
      void* const found = place("z", batch * shape_.numbers() * 4);
      void* const sum = place("log_det", batch * 4);
      run(block, "forward", number, tensors, {{"z", found, {}}, {"log_det", sum, {}}});
      download(z + start * shape_.numbers(), found, rows * shape_.numbers());
      download(log_det + start, sum, rows);
    }
  }

  void gradient(Call& call, std::size_t block, const float* x, const Branches& branches, float* grad) override {
    const Turn turn(turns_, call);
    const OnDevice device(device_);
    const auto [number, profile] = choose_profile("gradient", 1);
    for (std::int64_t start = 0; start < branches.batch; start += profile.batch[2]) {
      if (call.cancelled()) throw Cancelled();
      const std::int64_t rows = std::min(profile.batch[2], branches.batch - start),
                         batch = std::max(rows, profile.batch[0]);
      const std::vector<float> ones(static_cast<std::size_t>(batch), 1.0F);
      const std::vector<Tensor> tensors = {sequence("x", x, start, rows, batch), labels(branches, start, rows, batch),
                                           sequence("grad_z", grad, start, rows, batch),
                                           upload("grad_log_det", ones, {batch})};
      void* const found = place("grad_x", batch * shape_.numbers() * 4);
      run(block, "gradient", number, tensors, {{"grad_x", found, {}}});
      download(grad + start * shape_.numbers(), found, rows * shape_.numbers());
    }
  }

 private:
  struct Loaded {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::map<int, std::unique_ptr<nvinfer1::IExecutionContext>> contexts;  // by profile; behind the engine: goes first
  };

  // Decodes `rows` images from row `start` on, as a batch of `batch` whose last row is repeated.
  void solve(std::size_t block, int profile, std::int64_t batch, std::int64_t rows, std::int64_t start, const float* z,
             const Branches& branches, float* x, const OnStep& on_step) {
    const std::int64_t tokens = shape_.tokens(), patch_dim = shape_.patch_dim(), all = branches.count * batch;
    std::vector<float> latents = padded(z, start, rows, batch), known(latents.size(), 0.0F);
    const bool reversed = bundle_.manifest.blocks[block].reversed;
    for (std::int64_t b = 0; b < batch; ++b) {
      float* row = latents.data() + b * shape_.numbers();
      if (reversed) reverse(row);
      std::copy_n(row, patch_dim, known.data() + b * shape_.numbers());
    }
    nvinfer1::ICudaEngine& engine = *load(block, "step").engine;
    const std::int64_t item = built_.record.precision == "fp32" ? 4 : 2, zero = 0;
    std::vector<Tensor> inputs = {upload("x", known, {batch, 1, tokens, patch_dim}),
                                  upload("position", &zero, sizeof zero, {1}),
                                  upload("z", latents, {batch, tokens, patch_dim}),
                                  upload("offsets", &zero, sizeof zero, {1}),
                                  labels(branches, start, rows, batch),
                                  upload("mix", branches.mix, {2, branches.count, tokens}),
                                  upload("inverse_temperature", branches.inverse_temperature, {branches.count})};
    const std::int64_t size = all * shape_.heads() * tokens * shape_.head_dim * item;
    for (std::int64_t layer = 0; layer < shape_.layers; ++layer) {
      for (const char* part : {"key_", "value_"}) {
        const std::string name = part + std::to_string(layer);
        void* const cache = place(name, size);
        check(cudaMemsetAsync(cache, 0, static_cast<std::size_t>(size), stream_), "clear the cache");
        inputs.push_back({name, cache, {all, shape_.heads(), tokens, shape_.head_dim}});
      }
    }
    // State comes back in place. The position alone may not: it is copied behind the step.
    std::vector<Tensor> outputs;
    for (const Tensor& input : inputs) {
      if (input.name != "x" && input.name != "position" && !is_cache(input.name)) continue;
      const std::string next = input.name + "_next";
      const char* alias = engine.getAliasedInputTensor(next.c_str());
      if (input.name != "position" && (alias == nullptr || input.name != alias)) {
        throw bundle_error("block " + std::to_string(block) + "'s step engine does not update '" + input.name +
                           "' in place; " + rebuild());
      }
      outputs.push_back({next, alias != nullptr ? input.address : place(next, sizeof zero), {}});
    }
    void* const position = inputs[1].address;
    void* const position_next = outputs[1].address;
    const auto launch = [&] {
      run(block, "step", profile, inputs, outputs);
      if (position_next != position) {
        check(cudaMemcpyAsync(position, position_next, sizeof zero, cudaMemcpyDeviceToDevice, stream_),
              "advance the position");
      }
    };
    std::unique_ptr<CUgraphExec_st, decltype(&cudaGraphExecDestroy)> graph(nullptr, cudaGraphExecDestroy);
    try {
      for (std::int64_t step = 0; step + 1 < tokens; ++step) {  // the host counts: a device drops what is out of bounds
        if (step == 0 || !cuda_graph_) {
          launch();  // the first may still load kernels, which cannot be captured
        } else {
          if (!graph) graph.reset(capture(launch));
          check(cudaGraphLaunch(graph.get(), stream_), "replay a step");
        }
        if (step % kStepsInFlight == kStepsInFlight - 1) check(cudaStreamSynchronize(stream_), "finish a step");
        on_step(step);
      }
    } catch (...) {
      cudaStreamSynchronize(stream_);  // before the graph goes
      throw;
    }
    download(known.data(), inputs[0].address, rows * shape_.numbers());
    for (std::int64_t b = 0; b < rows; ++b) {
      float* row = known.data() + b * shape_.numbers();
      if (reversed) reverse(row);
      std::copy_n(row, shape_.numbers(), x + (start + b) * shape_.numbers());
    }
  }

  template <class Launch>
  cudaGraphExec_t capture(const Launch& launch) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture a step");
    try {
      launch();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "capture a step");
    const cudaError_t status = cudaGraphInstantiate(&made, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "make a graph of a step");
    return made;
  }

  // Puts one run of an engine on the stream.
  void run(std::size_t block, const std::string& kind, int profile, const std::vector<Tensor>& inputs,
           const std::vector<Tensor>& outputs) {
    Loaded& loaded = load(block, kind);
    auto& context = loaded.contexts[profile];
    if (!context) {
      std::unique_ptr<nvinfer1::IExecutionContext> made(
          loaded.engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
      if (!made || !made->setOptimizationProfileAsync(profile, stream_)) failed(block, kind, "has no context");
      context = std::move(made);
    }
    context->setDeviceMemoryV2(scratch_->address, static_cast<std::int64_t>(scratch_->size));
    bool fine = true;
    for (const Tensor& input : inputs) {
      Dims dims{};
      dims.nbDims = static_cast<std::int32_t>(input.shape.size());
      std::copy(input.shape.begin(), input.shape.end(), dims.d);
      fine = fine && context->setInputShape(input.name.c_str(), dims) &&
             context->setTensorAddress(input.name.c_str(), input.address);
    }
    for (const Tensor& output : outputs) fine = fine && context->setTensorAddress(output.name.c_str(), output.address);
    if (!fine || !context->enqueueV3(stream_)) failed(block, kind, "refused to run");
  }

  // A deserialised engine, its hash checked. Contexts of all engines share one scratch memory, as large as any needs.
  Loaded& load(std::size_t block, const std::string& kind) {
    if (low_memory_ &&
        std::any_of(loaded_.begin(), loaded_.end(), [&](const auto& entry) { return entry.first.first != block; })) {
      check(cudaStreamSynchronize(stream_), "finish a block");
      loaded_.clear();
    }
    const auto known = loaded_.find({block, kind});
    if (known != loaded_.end()) return known->second;
    const std::string name = built_.record.file(block, kind), path = (fs::path(built_.folder) / name).string();
    std::error_code error;
    if (fs::is_symlink(path, error) || !fs::is_regular_file(path, error))
      throw bundle_error("'" + path + "' is missing or no regular file; " + rebuild());
    std::ifstream file(path, std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    if (sha256(content) !=
        built_.record.engines.at(name).sha256) {  // of the bytes that are loaded, not of a second reading
      throw bundle_error("'" + path +
                         "' was changed after it was built: its SHA-256 is not the record's. It was not loaded; " +
                         rebuild());
    }
    Loaded loaded;
    loaded.engine.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
    if (!loaded.engine) failed(block, kind, "does not load");
    const auto type = built_.record.precision == "fp32"   ? nvinfer1::DataType::kFLOAT
                      : built_.record.precision == "fp16" ? nvinfer1::DataType::kHALF
                                                          : nvinfer1::DataType::kBF16;
    if (kind == "step" && loaded.engine->getTensorDataType("key_0") != type)
      failed(block, kind, "keeps its cache in another precision than recorded");
    const auto needed = static_cast<std::size_t>(loaded.engine->getDeviceMemorySizeV2());
    if (!scratch_ || scratch_->size < needed) {
      check(cudaStreamSynchronize(stream_), "finish a block");
      scratch_.reset();  // before there are two
      scratch_ = std::make_unique<DeviceMemory>(needed);
    }
    return loaded_.emplace(std::pair(block, kind), std::move(loaded)).first->second;
  }

  [[noreturn]] void failed(std::size_t block, const std::string& kind, const std::string& what) {
    throw bundle_error("block " + std::to_string(block) + "'s " + kind + " engine " + what +
                       ". TensorRT says: " + logger_.take() + "; " + rebuild());
  }

  std::string rebuild() const {
    return "build engines on this machine: " + built_.record.rebuild(bundle_.folder, here_);
  }

  std::pair<int, Profile> choose_profile(const std::string& kind, std::int64_t branches) const {
    const std::vector<Profile>& profiles = built_.record.profiles.at(kind);
    for (std::size_t i = 0; i < profiles.size(); ++i) {
      if (profiles[i].branches == branches && profiles[i].window[0] == 1) return {static_cast<int>(i), profiles[i]};
    }
    throw bundle_error("these engines take no " + std::to_string(branches) + " guidance branches; " + rebuild());
  }

  // Device memory by name, grown when more is asked for.
  void* place(const std::string& name, std::int64_t size) {
    std::unique_ptr<DeviceMemory>& memory = memory_[name];
    if (!memory || memory->size < static_cast<std::size_t>(size)) {
      check(cudaStreamSynchronize(stream_), "finish a run");
      memory.reset();
      memory = std::make_unique<DeviceMemory>(static_cast<std::size_t>(size));
    }
    return memory->address;
  }

  Tensor upload(const std::string& name, const void* data, std::size_t size, std::vector<std::int64_t> shape) {
    void* const address = place(name, static_cast<std::int64_t>(size));
    check(cudaMemcpyAsync(address, data, size, cudaMemcpyHostToDevice, stream_), "copy to the device");
    check(cudaStreamSynchronize(stream_), "copy to the device");  // `data` may be gone when this returns
    return {name, address, std::move(shape)};
  }

  template <class T>
  Tensor upload(const std::string& name, const std::vector<T>& data, std::vector<std::int64_t> shape) {
    return upload(name, data.data(), data.size() * sizeof(T), std::move(shape));
  }

  void download(float* to, const void* from, std::int64_t count) {
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "copy from the device");
    check(cudaStreamSynchronize(stream_), "copy from the device");
  }

  // Images `start` to `start` + `rows` of (B, T, D), the last one repeated to make up a batch.
  std::vector<float> padded(const float* x, std::int64_t start, std::int64_t rows, std::int64_t batch) const {
    std::vector<float> found(static_cast<std::size_t>(batch * shape_.numbers()));
    for (std::int64_t b = 0; b < batch; ++b) {
      std::copy_n(x + (start + std::min(b, rows - 1)) * shape_.numbers(), shape_.numbers(),
                  found.data() + b * shape_.numbers());
    }
    return found;
  }

  Tensor sequence(const char* name, const float* x, std::int64_t start, std::int64_t rows, std::int64_t batch) {
    return upload(name, padded(x, start, rows, batch), {batch, shape_.tokens(), shape_.patch_dim()});
  }

  Tensor labels(const Branches& branches, std::int64_t start, std::int64_t rows, std::int64_t batch) {
    std::vector<std::int64_t> found;
    for (std::int64_t g = 0; g < branches.count; ++g) {
      for (std::int64_t b = 0; b < batch; ++b) {
        found.push_back(branches.labels[static_cast<std::size_t>(g * branches.batch + start + std::min(b, rows - 1))]);
      }
    }
    return upload("labels", found, {branches.count, batch});
  }

  // Patch order to block order of a reversed block, and back.
  void reverse(float* row) const {
    for (std::int64_t a = 0, b = shape_.tokens() - 1; a < b; ++a, --b) {
      std::swap_ranges(row + a * shape_.patch_dim(), row + (a + 1) * shape_.patch_dim(), row + b * shape_.patch_dim());
    }
  }

  const Bundle& bundle_;
  const ModelShape& shape_;
  const bool low_memory_, cuda_graph_;
  const Here here_;
  const int device_;
  const Built built_;
  Logger logger_;
  mutable Turns turns_;  // everything runs on one stream, for one caller at a time
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<DeviceMemory> scratch_;
  std::map<std::pair<std::size_t, std::string>, Loaded> loaded_;
  std::map<std::string, std::unique_ptr<DeviceMemory>> memory_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, bool low_memory, bool cuda_graph) {
  return std::make_unique<TensorRtBackend>(bundle, low_memory, cuda_graph);
}

}  // namespace tarflow::internal
