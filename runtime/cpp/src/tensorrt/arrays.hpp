// Arrays in device memory by name of an engine's input or output, and their way there and back.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "tensorrt/cuda.hpp"

namespace tarflow::internal {

// One input or output of an engine: where it lies, and its shape (inputs).
struct Tensor {
  std::string name;
  void* address;
  std::vector<std::int64_t> shape;
};

class Arrays {
 public:
  explicit Arrays(cudaStream_t stream) : stream_(stream) {}

  // Memory for so many bytes, grown when more is asked for.
  void* place(const std::string& name, std::int64_t bytes) {
    std::unique_ptr<DeviceMemory>& memory = memory_[name];
    if (!memory || memory->size < static_cast<std::size_t>(bytes)) {
      check(cudaStreamSynchronize(stream_), "finish a run");
      memory.reset();  // before there are two
      memory = std::make_unique<DeviceMemory>(static_cast<std::size_t>(bytes));
    }
    return memory->address;
  }

  template <class T>
  Tensor upload(const std::string& name, const std::vector<T>& data, std::vector<std::int64_t> shape) {
    const std::size_t bytes = data.size() * sizeof(T);
    void* const address = place(name, static_cast<std::int64_t>(bytes));
    check(cudaMemcpyAsync(address, data.data(), bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
    check(cudaStreamSynchronize(stream_), "copy to the device");  // `data` may be gone when this returns
    return {name, address, std::move(shape)};
  }

  // All zeros.
  Tensor clear(const std::string& name, std::int64_t bytes, std::vector<std::int64_t> shape) {
    void* const address = place(name, bytes);
    check(cudaMemsetAsync(address, 0, static_cast<std::size_t>(bytes), stream_), "clear the cache");
    return {name, address, std::move(shape)};
  }

  void download(float* to, const void* from, std::int64_t count) const {
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "copy from the device");
    check(cudaStreamSynchronize(stream_), "copy from the device");
  }

 private:
  const cudaStream_t stream_;
  std::map<std::string, std::unique_ptr<DeviceMemory>> memory_;
};

}  // namespace tarflow::internal
