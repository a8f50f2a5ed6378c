// Engines that were built from a bundle, deserialised when first used, and launched on one stream.
#pragma once

#include <NvInferRuntime.h>

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "opening.hpp"
#include "tensorrt/arrays.hpp"
#include "tensorrt/built.hpp"

namespace tarflow::internal {

// Keeps TensorRT's errors, to be told in one exception instead of on stderr.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  std::string take();

 private:
  std::mutex mutex_;
  std::string said_;
};

// A step as a CUDA graph, which works at these addresses.
struct Captured {
  Captured() = default;
  ~Captured() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  cudaGraphExec_t graph = nullptr;
  std::vector<void*> addresses;
};

// An engine is native code: its hash is checked before it is loaded, code for the host embedded in it stays disabled.
// Made, used and destroyed while its device is the thread's.
class Engines {
 public:
  // Throws Error(TARFLOW_BUNDLE) if none fit `here`.
  Engines(const Bundle& bundle, const Opening& opening, const Here& here);
  ~Engines();
  Engines(const Engines&) = delete;
  Engines& operator=(const Engines&) = delete;

  // A block's engine. With `one_block`, those of other blocks are let go of.
  nvinfer1::ICudaEngine& get(std::size_t block, Kind kind) { return *load(block, kind).engine; }

  // The number of the profile for so many guidance branches, and its sizes.
  std::pair<int, Profile> profile(Kind kind, std::int64_t branches) const;

  // Puts one run of an engine on the stream.
  void launch(std::size_t block, Kind kind, int profile, const std::vector<Tensor>& inputs,
              const std::vector<Tensor>& outputs);

  // What steps of a block, of a profile and so many images, were captured as; nothing yet for a new shape. Those of the
  // last few shapes are kept, as long as engines and scratch memory stay where they are.
  Captured& captured(std::size_t block, int profile, std::int64_t batch);

  const Bundle& bundle;
  const Built built;
  cudaStream_t stream = nullptr;

 private:
  struct Loaded {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::map<int, std::unique_ptr<nvinfer1::IExecutionContext>> contexts;  // by profile; behind the engine: goes first
  };

  struct Shape {
    int profile;
    std::int64_t batch;
    std::map<std::size_t, Captured> steps;  // by block
  };

  Loaded& load(std::size_t block, Kind kind);
  std::string read(std::size_t block, Kind kind) const;
  nvinfer1::IExecutionContext& context(std::size_t block, Kind kind, int profile);
  [[noreturn]] void failed(std::size_t block, Kind kind, const std::string& what);

  const bool one_block_;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<DeviceMemory> scratch_;  // of all contexts, as large as any needs: they run one after the other
  std::map<std::pair<std::size_t, Kind>, Loaded> loaded_;
  std::list<Shape> captured_;  // the last used first; behind the engines: goes first
};

}  // namespace tarflow::internal
