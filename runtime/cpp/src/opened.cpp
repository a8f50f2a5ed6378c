#include "opened.hpp"

#include "error.hpp"
#include "native/backend.hpp"
#include "ort/backend.hpp"
#include "tensorrt/backend.hpp"

namespace tarflow::internal {
namespace {

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const Opening& opening) {
  if (opening.provider == "native") return std::make_unique<NativeBackend>(bundle, opening);
  if (opening.provider == "tensorrt") return open_tensorrt(bundle, opening);
  return std::make_unique<OrtBackend>(bundle, opening, !opening.on_cpu());
}

}  // namespace

Opened::Opened(const std::string& folder, const Opening& opening) : opening(opening), bundle(folder) {
  std::string reasons;
  if (opening.provider != "auto") {
    backend = open_backend(bundle, opening);
  } else {
    for (const char* name : {"tensorrt", "cuda"}) {
      try {
        backend = open_backend(bundle, Opening(opening, name));
        break;
      } catch (const std::exception& error) {
        const std::string why = error.what();
        reasons += std::string("; not ") + name + ": " + why.substr(0, why.find("; "));
      }
    }
    if (!backend) backend = open_backend(bundle, Opening(opening, "cpu"));
  }
  description = backend->description() + reasons;
  say(TARFLOW_LOG_INFO, "opened '" + folder + "' on " + description);
}

void Opened::say(int level, const std::string& message) const {
  if (opening.log != nullptr && opening.log(opening.user, level, message.c_str()) != 0) throw Cancelled();
}

}  // namespace tarflow::internal
