// CUDA, as far as the TensorRT backend needs it: errors as exceptions, memory that frees itself.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "error.hpp"

namespace tarflow::internal {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call that succeeds would tell it again
  if (status == cudaErrorMemoryAllocation)
    throw machine_error("out of GPU memory; use a smaller `batch_size`, or `low_memory`");
  throw machine_error(std::string("CUDA cannot ") + what + ": " + cudaGetErrorString(status));
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t size) : size(size) {
    check(cudaMalloc(&address, std::max<std::size_t>(size, 1)), "allocate memory");
  }
  ~DeviceMemory() { cudaFree(address); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* address = nullptr;
  const std::size_t size;
};

// Makes a device the thread's; at the end the thread gets back its own.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "name the device");
    check(cudaSetDevice(device), "choose the device");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "name the device");
  return device;
}

}  // namespace tarflow::internal
