#include "tensorrt/engines.hpp"

#include <NvInferVersion.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

static_assert(NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1015, "a cache in place needs TensorRT 10.15 or newer");

namespace tarflow::internal {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostShapes = 8;  // whose steps stay captured
constexpr const char* kAgain = "build the engines again";

nvinfer1::DataType type_of(const Precision& precision) { return static_cast<nvinfer1::DataType>(precision.tensorrt); }
static_assert(kPrecisions[0].tensorrt == int(nvinfer1::DataType::kFLOAT) &&
              kPrecisions[1].tensorrt == int(nvinfer1::DataType::kHALF) &&
              kPrecisions[2].tensorrt == int(nvinfer1::DataType::kBF16));

std::string name_of(std::size_t block, Kind kind) {
  return "block " + text_of(block) + "'s " + kKindNames[kind] + " engine";
}

}  // namespace

void Logger::log(Severity severity, const char* message) noexcept {
  if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (said_.size() < 600) said_ += (said_.empty() ? "" : "; ") + std::string(message).substr(0, 300);
  } catch (...) {  // without memory its words are lost, its refusal is not
  }
}

std::string Logger::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string said = said_.empty() ? "no reason given" : std::move(said_);
  said_.clear();
  return said;
}

Engines::Engines(const Bundle& bundle, const Opening& opening, const Here& here)
    : bundle(bundle), built(choose_built(bundle, here)), one_block_(opening.one_block) {
  runtime_.reset(nvinfer1::createInferRuntime(logger_));
  if (!runtime_) throw machine_error("TensorRT does not start: " + logger_.take());
  runtime_->setEngineHostCodeAllowed(false);
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
}

Engines::~Engines() {
  cudaStreamSynchronize(stream);
  captured_.clear();
  loaded_.clear();
  scratch_.reset();
  cudaStreamDestroy(stream);
}

std::pair<int, Profile> Engines::profile(Kind kind, std::int64_t branches) const {
  const std::vector<Profile>& profiles = built.record.profiles[kind];
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    if (profiles[i].branches == branches && profiles[i].window[0] == 1) return {static_cast<int>(i), profiles[i]};
  }
  throw bundle_error("these engines take no " + text_of(branches) + " guidance branches; " + kAgain);
}

void Engines::launch(std::size_t block, Kind kind, int profile, const std::vector<Tensor>& inputs,
                     const std::vector<Tensor>& outputs) {
  nvinfer1::IExecutionContext& context = this->context(block, kind, profile);
  context.setDeviceMemoryV2(scratch_->address, static_cast<std::int64_t>(scratch_->size));
  bool fine = true;
  for (const Tensor& input : inputs) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(input.shape.size());
    std::copy(input.shape.begin(), input.shape.end(), dims.d);
    fine = fine && context.setInputShape(input.name.c_str(), dims) &&
           context.setTensorAddress(input.name.c_str(), input.address);
  }
  for (const Tensor& output : outputs) fine = fine && context.setTensorAddress(output.name.c_str(), output.address);
  if (!fine || !context.enqueueV3(stream)) failed(block, kind, "refused to run");
}

Captured& Engines::captured(std::size_t block, int profile, std::int64_t batch) {
  const auto same = [&](const Shape& shape) { return shape.profile == profile && shape.batch == batch; };
  const auto found = std::find_if(captured_.begin(), captured_.end(), same);
  if (found != captured_.end()) {
    captured_.splice(captured_.begin(), captured_, found);
  } else {
    captured_.emplace_front();
    captured_.front().profile = profile;
    captured_.front().batch = batch;
    if (captured_.size() > kMostShapes) captured_.pop_back();
  }
  return captured_.front().steps[block];
}

nvinfer1::IExecutionContext& Engines::context(std::size_t block, Kind kind, int profile) {
  Loaded& loaded = load(block, kind);
  auto& context = loaded.contexts[profile];
  if (!context) {
    std::unique_ptr<nvinfer1::IExecutionContext> made(
        loaded.engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (!made || !made->setOptimizationProfileAsync(profile, stream)) failed(block, kind, "has no context");
    context = std::move(made);
  }
  return *context;
}

Engines::Loaded& Engines::load(std::size_t block, Kind kind) {
  if (one_block_ &&
      std::any_of(loaded_.begin(), loaded_.end(), [&](const auto& entry) { return entry.first.first != block; })) {
    check(cudaStreamSynchronize(stream), "finish a block");
    captured_.clear();
    loaded_.clear();
  }
  const auto known = loaded_.find({block, kind});
  if (known != loaded_.end()) return known->second;
  const std::string content = read(block, kind);
  Loaded loaded;
  loaded.engine.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
  if (!loaded.engine) failed(block, kind, "does not load");
  if (kind == kStep && loaded.engine->getTensorDataType("key_0") != type_of(*built.record.precision)) {
    failed(block, kind, "keeps its cache in another precision than recorded");
  }
  const auto needed = static_cast<std::size_t>(loaded.engine->getDeviceMemorySizeV2());
  if (!scratch_ || scratch_->size < needed) {
    check(cudaStreamSynchronize(stream), "finish a block");
    captured_.clear();
    scratch_.reset();  // before there are two
    scratch_ = std::make_unique<DeviceMemory>(needed);
  }
  return loaded_.emplace(std::pair(block, kind), std::move(loaded)).first->second;
}

// The content of an engine's file, its hash checked: of the bytes that are loaded, not of a second reading.
std::string Engines::read(std::size_t block, Kind kind) const {
  const std::string name = built.record.file(block, kind), path = (fs::path(built.folder) / name).string();
  std::error_code error;
  if (fs::is_symlink(path, error) || !fs::is_regular_file(path, error)) {
    throw bundle_error("'" + path + "' is missing or no regular file; " + kAgain);
  }
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (sha256(content) != built.record.engines.at(name).sha256) {
    throw bundle_error("'" + path + "' was changed after it was built: its SHA-256 is not the record's. It was not " +
                       "loaded; " + kAgain);
  }
  return content;
}

void Engines::failed(std::size_t block, Kind kind, const std::string& what) {
  throw bundle_error(name_of(block, kind) + " " + what + ". TensorRT says: " + logger_.take() + "; " + kAgain);
}

}  // namespace tarflow::internal
