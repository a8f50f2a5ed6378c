#include "ort/sessions.hpp"

#include <algorithm>

#include "error.hpp"
#include "ort/resident.hpp"

namespace tarflow::internal {
namespace {

constexpr int kMostCaptures = 64;  // of one graph's steps: more than shapes usually make

const char* provider_name(const Opening& opening) {
  return opening.on_cpu() ? "CPUExecutionProvider" : "CUDAExecutionProvider";
}

// Whether a graph makes steps whose state stays on the device.
bool on_device(Kind kind) { return kind == kResident || kind == kCuda || kind == kCudaGuided; }

bool says(const std::string& message, const char* words) { return message.find(words) != std::string::npos; }

// Whether ONNX Runtime met a limit of memory, threads or open files.
bool of_the_machine(const std::string& message) {
  constexpr const char* kLimits[] = {"llocat",       "bad_alloc",          "ut of memory",
                                     "PosixThread", "temporarily unavail", "Too many open files"};
  return std::any_of(std::begin(kLimits), std::end(kLimits), [&](const char* words) { return says(message, words); });
}

}  // namespace

Sessions::Sessions(const Bundle& bundle, const Opening& opening)
    : bundle(bundle),
      opening(opening),
      library(opening.onnxruntime),
      device(opening),
      captures_(opening.cuda_graph && !opening.on_cpu()),
      weights_(*this) {
  const std::vector<std::string> available = library.providers();
  if (std::find(available.begin(), available.end(), provider_name(opening)) != available.end()) return;
  std::string all;
  for (const std::string& name : available) all += (all.empty() ? "" : ", ") + name;
  throw machine_error("`provider` '" + opening.provider + "' needs " + provider_name(opening) + "; this ONNX Runtime " +
                      library.version + " has " + all + ". Name one for GPUs by `onnxruntime`, or use `provider` cpu");
}

Sessions::~Sessions() {
  const auto held = device.touch();
  open_.clear();
}

std::string Sessions::description() const {
  const std::string name = provider_name(opening);
  return "ONNX Runtime " + library.version + ", " + name.substr(0, name.find("Execution")) + why_not_;
}

Session Sessions::get(std::size_t block, Kind kind) {
  const auto held = device.touch();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (opening.one_block) {  // sessions in use elsewhere live on until their users let go of them
    for (auto at = open_.begin(); at != open_.end();) at = at->first.first == block ? std::next(at) : open_.erase(at);
  }
  Session& found = open_[{block, kind}];
  if (!found) found = open(block, kind);
  return found;
}

std::pair<Session, int> Sessions::to_capture(std::size_t block, Kind kind) {
  Session session = get(block, kind);  // which may find out that nothing can be captured
  if (!captures_) return {session, 0};
  int& captured = captured_[{block, kind}];
  if (++captured > kMostCaptures) {
    for (ResidentSteps* holder : holders) holder->forget(block, kind);
    open_.erase({block, kind});
    session.reset();
    session = get(block, kind);
    captured = 1;
  }
  return {session, captured};
}

Owned<OrtValue> Sessions::tensor(void* address, const Shape& shape, ONNXTensorElementDataType type) const {
  if (device.on_cpu) return library.tensor(address, shape, type);
  OrtMemoryInfo* info = nullptr;
  library.check(library.api->CreateMemoryInfo("Cuda", OrtDeviceAllocator, device.number, OrtMemTypeDefault, &info),
                "it has no memory");
  const Owned<OrtMemoryInfo> place = library.own(info);
  OrtValue* value = nullptr;
  const std::size_t bytes = static_cast<std::size_t>(count(shape)) * item_size(type);
  library.check(library.api->CreateTensorWithDataAsOrtValue(info, address, bytes, shape.data(), shape.size(), type,
                                                            &value),
                "it refuses a tensor");
  return library.own(value);
}

void Sessions::run(const Pass& pass, Kind kind, const std::vector<Place>& inputs, const std::vector<Place>& outputs) {
  const auto held = device.touch();
  const Session session = get(pass.block, kind);
  std::vector<Owned<OrtValue>> owned;
  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> in;
  std::vector<OrtValue*> out;
  for (const Place& place : inputs) {
    owned.push_back(library.tensor(place.data, place.shape, place.type));
    input_names.push_back(place.name);
    in.push_back(owned.back().get());
  }
  for (const Place& place : outputs) {
    owned.push_back(library.tensor(place.data, place.shape, place.type));
    output_names.push_back(place.name);
    out.push_back(owned.back().get());
  }
  auto* options = static_cast<OrtRunOptions*>(pass.call.engine.get());
  check_run(library.api->Run(session.get(), options, input_names.data(), in.data(), in.size(), output_names.data(),
                             out.size(), out.data()),
            pass, kind);
}

void Sessions::check_run(OrtStatus* status, const Pass& pass, Kind kind) const {
  if (status == nullptr) return;
  const std::string message = library.message(status);
  pass.call.check();
  const std::string where = "block " + text_of(pass.block) + "'s " + kKindNames[kind] + " graph";
  if (message.find("llocate") != std::string::npos) {
    throw machine_error("out of memory in " + where + "; use a smaller `batch_size`, or `low_memory`");
  }
  throw bundle_error(where + " failed in " + description() + ": " +
                     message.substr(0, message.find('\n')).substr(0, 300));
}

Session Sessions::open(std::size_t block, Kind kind) {
  const std::string& name = bundle.graph(block, kind);
  const std::string path = bundle.path(name);
  Session session;
  const bool captured = on_device(kind) && captures_;
  OrtStatus* status = create(block, kind, captured, session);
  if (status != nullptr && captured) {  // a node that has no CUDA kernel in this version: slower, not wrong
    captures_ = false;
    why_not_ = ", without CUDA graphs: " + library.message(status).substr(0, 120);
    status = create(block, kind, false, session);
  }
  const std::string message = status != nullptr ? library.message(status) : "";
  bundle.require_unchanged(name);  // after it was read, so that what was read is what was hashed
  bundle.require_unchanged(kWeights);
  if (status == nullptr) return session;
  const bool limit = of_the_machine(message);
  const bool device = !opening.on_cpu() && (says(message, "CUDA") || says(message, "rovider"));
  throw Error(limit || device ? TARFLOW_MACHINE : TARFLOW_BUNDLE,
              "'" + path + "' cannot be loaded by " + description() + ": " + message.substr(0, 300) +
                  (limit ? "; use fewer `threads`, or raise the process's limits of memory and threads" : ""));
}

OrtStatus* Sessions::create(std::size_t block, Kind kind, bool captured, Session& made) {
  const Owned<OrtSessionOptions> options = this->options(kind);
  const std::string& graph = bundle.graph(block, kind);
  std::shared_ptr<const void> weights;
  if (!opening.on_cpu()) {
    append_cuda(options.get(), captured);
    weights = weights_.give(options.get(), block, graph);
  }
  OrtSession* session = nullptr;
  OrtStatus* status =
      library.api->CreateSession(library.environment.get(), bundle.path(graph).c_str(), options.get(), &session);
  made = Session(session, [release = Release{library.api}, weights](OrtSession* one) { release(one); });
  return status;
}

Owned<OrtSessionOptions> Sessions::options(Kind kind) const {
  const OrtApi* api = library.api;
  OrtSessionOptions* made = nullptr;
  library.check(api->CreateSessionOptions(&made), "it has no memory");
  Owned<OrtSessionOptions> options = library.own(made);
  const auto entry = [&](const char* key, const char* value) {
    library.check(api->AddSessionConfigEntry(made, key, value), std::string("it refuses ") + key);
  };
  library.check(api->SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), "it refuses a log level");
  library.check(api->SetInterOpNumThreads(made, 1), "it refuses one thread");
  if (opening.threads > 0) library.check(api->SetIntraOpNumThreads(made, opening.threads), "it refuses the threads");
  if (!opening.spinning) entry("session.intra_op.allow_spinning", "0");
  // Blocks run one after the other: the last one's idle threads must not take a core from this one's.
  if (opening.spinning) entry("session.force_spinning_stop", "1");
  // Prepacking copies the weights of every session. It pays only where a graph runs once a step.
  const bool stepping = kind == kStep || on_device(kind);
  if (!stepping) entry("session.disable_prepacking", "1");
  if (bundle.manifest.precision->int8) {  // steps multiply in int8; what judges them does not
    entry("session.qdq_matmulnbits_accuracy_level", stepping ? "4" : "1");
    entry("session.qdq_matmulnbits_block_size", "64");
  }
  return options;
}

void Sessions::append_cuda(OrtSessionOptions* options, bool captured) const {
  const OrtApi* api = library.api;
  OrtCUDAProviderOptionsV2* made = nullptr;
  library.check(api->CreateCUDAProviderOptions(&made), "its CUDA provider does not start");
  const Owned<OrtCUDAProviderOptionsV2> provider = library.own(made);
  // By default fp32's products would round what they multiply to 10 bits of mantissa.
  const std::string number = text_of(device.number);
  const char* const keys[] = {"use_tf32", "device_id", "enable_cuda_graph"};
  const char* const values[] = {"0", number.c_str(), captured ? "1" : "0"};
  library.check(api->UpdateCUDAProviderOptions(made, keys, values, 3), "its CUDA provider refuses its options");
  library.check(api->SessionOptionsAppendExecutionProvider_CUDA_V2(options, made), "its CUDA provider does not start");
}

}  // namespace tarflow::internal
