// ONNX Runtime's library, loaded when it is first needed: any version from 1.21 on.
#pragma once

#define ORT_API_MANUAL_INIT  // no global of the headers is used; this keeps them from calling OrtGetApiBase themselves
#include <onnxruntime_c_api.h>

#include <memory>
#include <string>
#include <vector>

namespace tarflow::internal {

using Shape = std::vector<std::int64_t>;

// What owns an object of ONNX Runtime releases it through the function table it came from.
struct Release {
  const OrtApi* api = nullptr;
  void operator()(OrtEnv* p) const { api->ReleaseEnv(p); }
  void operator()(OrtSession* p) const { api->ReleaseSession(p); }
  void operator()(OrtSessionOptions* p) const { api->ReleaseSessionOptions(p); }
  void operator()(OrtRunOptions* p) const { api->ReleaseRunOptions(p); }
  void operator()(OrtMemoryInfo* p) const { api->ReleaseMemoryInfo(p); }
  void operator()(OrtAllocator* p) const { api->ReleaseAllocator(p); }
  void operator()(OrtIoBinding* p) const { api->ReleaseIoBinding(p); }
  void operator()(OrtValue* p) const { api->ReleaseValue(p); }
  void operator()(OrtCUDAProviderOptionsV2* p) const { api->ReleaseCUDAProviderOptions(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;

// The table of functions, and what all sessions share.
class Library {
 public:
  // `file` empty: $TARFLOW_ONNXRUNTIME, else as the loader finds it. Throws Error(TARFLOW_MACHINE).
  explicit Library(const std::string& file);

  // Throws Error(TARFLOW_MACHINE), saying `what`, unless the status is fine.
  void check(OrtStatus* status, const std::string& what) const;

  // The message of a status that is not fine; the status is released.
  std::string message(OrtStatus* status) const;

  std::vector<std::string> providers() const;

  // A tensor in the caller's memory, which must outlive it.
  Owned<OrtValue> tensor(void* data, const Shape& shape, ONNXTensorElementDataType type) const;

  template <class T>
  Owned<T> own(T* object) const {
    return Owned<T>(object, Release{api});
  }

  const OrtApi* api = nullptr;
  std::string version;
  Owned<OrtEnv> environment;
  Owned<OrtMemoryInfo> host;
};

}  // namespace tarflow::internal
