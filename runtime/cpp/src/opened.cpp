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

// The first that works here, and why none before it; the native engine where it is not slower, which comes first of the
// reasons.
std::unique_ptr<Backend> first_of_all(const Bundle& bundle, const Opening& opening, std::string& reasons) {
  for (const char* name : {"tensorrt", "cuda"}) {
    try {
      return open_backend(bundle, Opening(opening, name));
    } catch (const std::exception& error) {
      const std::string why = error.what();
      reasons += std::string("; not ") + name + ": " + why.substr(0, why.find("; "));
    }
  }
  const std::string against = why_not_native(bundle.manifest);
  if (against.empty()) return open_backend(bundle, Opening(opening, "native"));
  reasons = "; not native: " + against + reasons;
  return open_backend(bundle, Opening(opening, "cpu"));
}

}  // namespace

Opened::Opened(const std::string& folder, const Opening& opening) : opening(opening), bundle(folder) {
  std::string reasons;
  if (opening.native()) {
    backend = open_backend(bundle, Opening(opening, "native"));
  } else if (opening.provider == "auto") {
    backend = first_of_all(bundle, opening, reasons);
  } else {
    backend = open_backend(bundle, opening);
  }
  description = backend->description() + reasons;
  say(TARFLOW_LOG_INFO, "opened '" + folder + "' on " + description);
}

void Opened::say(int level, const std::string& message) const {
  if (opening.log != nullptr && opening.log(opening.user, level, message.c_str()) != 0) throw Cancelled();
}

}  // namespace tarflow::internal
