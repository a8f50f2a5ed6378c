// Where ONNX Runtime computes: on the host, or on a GPU that all threads of a process take turns on.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "opening.hpp"

namespace tarflow::internal {

class Device {
 public:
  // Throws Error: TARFLOW_INPUT for a GPU that is not here.
  explicit Device(const Opening& opening);

  // Held by whoever opens, runs, copies or lets go of anything on a GPU; nothing on the host. ONNX Runtime captures in
  // CUDA's mode Global, in which what any other thread does on a device fails the capture.
  std::unique_lock<std::recursive_mutex> touch() const;

  // Throw Error(TARFLOW_MACHINE). Whoever calls them touches the device.
  void* allocate(std::size_t size) const;
  void write(void* to, const void* from, std::size_t size) const;
  void read(void* to, const void* from, std::size_t size) const;
  void release(void* address) const;

  const bool on_cpu;
  const int number;

 private:
  struct Cuda;  // the functions of CUDA's runtime that this takes
  const Cuda& cuda() const;
  void copy(void* to, const void* from, std::size_t size, int kind) const;
};

// Memory of a device.
class Buffer {
 public:
  Buffer(const Device& device, std::size_t size) : address(device.allocate(size)), size(size), device_(device) {}
  ~Buffer() { device_.release(address); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* const address;
  const std::size_t size;

 private:
  const Device& device_;
};

}  // namespace tarflow::internal
