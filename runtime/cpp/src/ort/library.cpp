#include "ort/library.hpp"

#include <dlfcn.h>

#include <cstdlib>

#include "error.hpp"
#include "ort/tensors.hpp"

namespace tarflow::internal {
namespace {

constexpr std::uint32_t kApi = 21;  // the oldest table of functions that has all we call; newer libraries offer it

// The library stays loaded: ONNX Runtime's threads and registries do not survive being unloaded.
const OrtApiBase* load(const std::string& chosen) {
  // Since 1.29 it writes below HOME and reports to its makers once it has an environment, before a program can say no by
  // its API. A value that is there already is the user's own wish.
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  setenv("ORT_ENABLE_XQA", "0", 0);  // attention of one position by flash attention's one kernel, not by four others
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
  throw machine_error("ONNX Runtime cannot be loaded (" + reason + "); install libonnxruntime, or name its file by " +
                      "`onnxruntime` or TARFLOW_ONNXRUNTIME (pip's onnxruntime holds it in onnxruntime/capi)");
}

}  // namespace

Library::Library(const std::string& file) {
  const OrtApiBase* base = load(file);
  version = base->GetVersionString();
  api = base->GetApi(kApi);
  if (api == nullptr) {
    throw machine_error("this is ONNX Runtime " + version + "; 1." + text_of(kApi) + " or newer is needed");
  }
  OrtEnv* made = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "tarflow", &made), "it does not start");
  environment = own(made);
  OrtMemoryInfo* info = nullptr;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), "it has no memory");
  host = own(info);
}

std::string Library::message(OrtStatus* status) const {
  std::string text = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  return text;
}

void Library::check(OrtStatus* status, const std::string& what) const {
  if (status == nullptr) return;
  throw machine_error("ONNX Runtime " + version + ": " + what + " (" + message(status).substr(0, 300) + ")");
}

std::vector<std::string> Library::providers() const {
  char** available = nullptr;
  int count = 0;
  check(api->GetAvailableProviders(&available, &count), "its providers cannot be listed");
  std::vector<std::string> found(available, available + count);
  check(api->ReleaseAvailableProviders(available, count), "its providers cannot be listed");
  return found;
}

Owned<OrtValue> Library::tensor(void* data, const Shape& shape, ONNXTensorElementDataType type) const {
  OrtValue* value = nullptr;
  const std::size_t bytes = static_cast<std::size_t>(count(shape)) * item_size(type);
  check(api->CreateTensorWithDataAsOrtValue(host.get(), data, bytes, shape.data(), shape.size(), type, &value),
        "it refuses a tensor");
  return own(value);
}

}  // namespace tarflow::internal
