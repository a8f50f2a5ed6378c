// Opening a bundle: the engine that was asked for, or the first that works here.
#include "error.hpp"
#include "flow.hpp"
#include "ort.hpp"
#include "tensorrt.hpp"

namespace tarflow::internal {
namespace {

std::unique_ptr<Backend> open_backend(const std::string& provider, const Bundle& bundle,
                                      const tarflow_open_options& options) {
  if (provider == "tensorrt") return open_tensorrt(bundle, options.low_memory != 0, options.cuda_graph != 0);
  EngineOptions engine;
  engine.provider = provider;
  engine.library = options.onnxruntime != nullptr ? options.onnxruntime : "";
  engine.threads = options.threads;
  engine.spinning = options.spinning != 0;
  engine.low_memory = options.low_memory != 0;
  return std::make_unique<OrtBackend>(bundle, engine);
}

}  // namespace

std::shared_ptr<Opened> open_bundle(const std::string& folder, const tarflow_open_options& options) {
  const std::string provider = options.provider != nullptr ? options.provider : "cpu";
  if (provider != "auto" && provider != "cpu" && provider != "cuda" && provider != "tensorrt") {
    throw input_error("provider '" + provider + "' is unknown; expected one of auto, cpu, cuda, tensorrt");
  }
  if (options.threads < 0) {
    throw input_error("threads is " + std::to_string(options.threads) + "; expected 1 or more, or 0 for one a core");
  }
  auto opened = std::make_shared<Opened>(folder, options.log, options.user);
  std::string reasons;
  if (provider == "auto") {
    for (const char* name : {"tensorrt", "cuda"}) {
      try {
        opened->backend = open_backend(name, opened->bundle, options);
        break;
      } catch (const std::exception& error) {
        const std::string why = error.what();
        reasons += std::string("; not ") + name + ": " + why.substr(0, why.find("; "));
      }
    }
  }
  if (!opened->backend) opened->backend = open_backend(provider == "auto" ? "cpu" : provider, opened->bundle, options);
  opened->backend_description = opened->backend->description() + reasons;
  opened->say(TARFLOW_LOG_INFO, "opened '" + folder + "' on " + opened->backend_description);
  return opened;
}

void Opened::say(int level, const std::string& message) const {
  if (log != nullptr && log(user, level, message.c_str()) != 0) throw Cancelled();
}

}  // namespace tarflow::internal
