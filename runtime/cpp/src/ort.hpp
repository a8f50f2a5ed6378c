// The backend on ONNX Runtime, whose library is loaded when it is first needed: any version from 1.21 on.
#pragma once

#define ORT_API_MANUAL_INIT  // no global of the headers is used; this keeps them from calling OrtGetApiBase themselves
#include <onnxruntime_c_api.h>

#include <map>

#include "backend.hpp"

namespace tarflow::internal {

struct EngineOptions {
  std::string provider = "cpu";  // "cpu" or "cuda"
  std::string library;           // file of ONNX Runtime; empty: $TARFLOW_ONNXRUNTIME, else as the loader finds it
  int threads = 0;               // 0: one a core
  bool spinning = true;
  bool low_memory = false;
  bool resident = false;  // keep the state of decoding where the provider computes; always so on a GPU
};

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

class OrtBackend final : public Backend {
 public:
  // Throws Error: TARFLOW_MACHINE if the library or the provider is not to be had, TARFLOW_BUNDLE for a bundle without
  // the graphs that it needs there.
  OrtBackend(const Bundle& bundle, const EngineOptions& options);
  ~OrtBackend() override;

  void prepare(Call& call) const override;
  void invert(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
              const OnStep& on_step) override;
  void forward(Call& call, std::size_t block, const float* x, const Branches& branches, float* z,
               float* log_det) override;
  void gradient(Call& call, std::size_t block, const float* x, const Branches& branches, float* grad) override;
  std::string description() const override;

 private:
  friend class StepGraph;
  friend class ResidentGraph;
  using Session = std::shared_ptr<OrtSession>;
  struct Place {  // of one input or output in memory
    const char* name;
    void* data;
    std::vector<std::int64_t> shape;
    ONNXTensorElementDataType type;
  };

  void invert_resident(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                       const OnStep& on_step);
  void invert_stepwise(Call& call, std::size_t block, const float* z, const Branches& branches, float* x,
                       const OnStep& on_step);
  Session session(std::size_t block, Kind kind);
  Session open(std::size_t block, Kind kind) const;
  void append_provider(OrtSessionOptions* options) const;
  Owned<OrtValue> tensor(void* data, const std::vector<std::int64_t>& shape, ONNXTensorElementDataType type) const;
  void run(Call& call, std::size_t block, Kind kind, const std::vector<Place>& inputs,
           const std::vector<Place>& outputs);
  void check(OrtStatus* status, const std::string& what) const;
  [[noreturn]] void failed(std::size_t block, Kind kind, const std::string& message) const;
  void check_run(Call& call, OrtStatus* status, std::size_t block, Kind kind) const;
  std::int64_t rows_that_fit(std::int64_t attention, std::int64_t hidden) const;
  template <class T>
  Owned<T> own(T* object) const {
    return Owned<T>(object, Release{api_});
  }

  const Bundle& bundle_;
  const EngineOptions options_;
  const OrtApi* api_ = nullptr;
  std::string version_;
  Owned<OrtEnv> environment_;
  Owned<OrtMemoryInfo> host_;
  const bool resident_;
  const ONNXTensorElementDataType cache_type_;
  const std::size_t cache_item_;  // bytes
  std::mutex mutex_;              // of the sessions
  std::map<std::pair<std::size_t, Kind>, Session> sessions_;
};

}  // namespace tarflow::internal
