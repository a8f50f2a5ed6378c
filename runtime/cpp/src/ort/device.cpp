#include "ort/device.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "error.hpp"
#include "gpus.hpp"

namespace tarflow::internal {
namespace {

constexpr const char* kRuntimes[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so"};
constexpr int kToDevice = 1, kToHost = 2;  // cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost

}  // namespace

struct Device::Cuda {
  Cuda() {
    void* library = nullptr;
    for (const char* name : kRuntimes) {
      if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    const auto find = [library](const char* name, auto& function) {
      void* const found = library != nullptr ? dlsym(library, name) : nullptr;
      function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
      if (function == nullptr) throw machine_error("CUDA's runtime (libcudart) is not to be found; use `provider` cpu");
    };
    find("cudaSetDevice", choose);
    find("cudaMalloc", allocate);
    find("cudaFree", release);
    find("cudaMemcpy", copy);
    find("cudaStreamSynchronize", wait);
  }
  int (*choose)(int);
  int (*allocate)(void**, std::size_t);
  int (*release)(void*);
  int (*copy)(void*, const void*, std::size_t, int);
  int (*wait)(void*);
};

Device::Device(const Opening& opening) : on_cpu(opening.on_cpu()), number(numbered_gpu(opening.device)) {}

std::unique_lock<std::recursive_mutex> Device::touch() const {
  static auto* const mutex = new std::recursive_mutex;  // there for whoever lets go of something when the process ends
  return on_cpu ? std::unique_lock<std::recursive_mutex>() : std::unique_lock<std::recursive_mutex>(*mutex);
}

void* Device::allocate(std::size_t size) const {
  void* address = nullptr;
  if (on_cpu) {
    address = std::malloc(size);
  } else if (cuda().allocate(&address, size) != 0) {
    address = nullptr;
  }
  if (address != nullptr) return address;
  throw machine_error("out of memory; use a smaller `batch_size`, or `low_memory`");
}

void Device::write(void* to, const void* from, std::size_t size) const { copy(to, from, size, kToDevice); }

void Device::read(void* to, const void* from, std::size_t size) const { copy(to, from, size, kToHost); }

void Device::release(void* address) const {
  if (on_cpu) {
    std::free(address);
  } else {
    cuda().release(address);
  }
}

const Device::Cuda& Device::cuda() const {
  static const Cuda all;
  all.choose(number);
  return all;
}

void Device::copy(void* to, const void* from, std::size_t size, int kind) const {
  if (on_cpu) {
    std::memcpy(to, from, size);
    return;
  }
  // A copy to a device may be under way when it returns; ONNX Runtime's stream does not wait for CUDA's usual one.
  if (cuda().copy(to, from, size, kind) != 0 || cuda().wait(nullptr) != 0) {
    throw machine_error("CUDA cannot copy to or from the device");
  }
}

}  // namespace tarflow::internal
