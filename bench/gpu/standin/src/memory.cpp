// Memory: all of it the host's, kept apart by what it pretends to be.
#include <cstdlib>
#include <cstring>

#include "state.hpp"

using namespace standin;

namespace {

cudaError_t allocate(const char* call, void** address, size_t size, Regions& regions) {
  unsafe(format("%s bytes=%zu", call, size));
  const std::lock_guard<std::mutex> lock(state().mutex);
  const size_t bytes = size == 0 ? 1 : size;
  const bool on_device = &regions == &state().device;
  if (on_device && bytes > kMemory - state().used) return failed(cudaErrorMemoryAllocation);
  if (posix_memalign(address, 512, bytes) != 0) return failed(cudaErrorMemoryAllocation);
  memset(*address, 0, bytes);
  regions[static_cast<const char*>(*address)] = bytes;
  if (on_device) {
    state().used += bytes;
    write(format("allocated bytes=%zu at=%p device=%d", bytes, *address, device));
  }
  return cudaSuccess;
}

cudaError_t release(const char* call, void* address, Regions& regions) {
  unsafe(format("%s at=%p", call, address));
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = regions.find(static_cast<const char*>(address));
  if (found == regions.end()) return address == nullptr ? cudaSuccess : failed(cudaErrorInvalidValue);
  if (&regions == &state().device) {
    state().used -= found->second;
    write(format("released bytes=%zu at=%p", found->second, address));
  }
  regions.erase(found);
  free(address);
  return cudaSuccess;
}

std::string copying(const char* call, const void* target, const void* source, size_t size) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return format("%s bytes=%zu from=%s to=%s", call, size, place(source), place(target));
}

bool pageable(const std::string& line) { return line.find("pageable") != std::string::npos; }

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t size) { return allocate("cudaMalloc", p, size, state().device); }
cudaError_t cudaFree(void* p) { return release("cudaFree", p, state().device); }
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  return allocate("cudaHostAlloc", p, size, state().pinned);
}
cudaError_t cudaMallocHost(void** p, size_t size) { return allocate("cudaMallocHost", p, size, state().pinned); }
cudaError_t cudaFreeHost(void* p) { return release("cudaFreeHost", p, state().pinned); }
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  unsafe(copying("cudaMemcpy", target, source, size));
  memmove(target, source, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  const std::string line = copying("cudaMemcpyAsync", target, source, size);
  if (!launch(line, stream, pageable(line))) memmove(target, source, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  const std::string line = copying("cudaMemcpy2DAsync", target, source, width * height);
  if (launch(line, stream, pageable(line))) return cudaSuccess;
  for (size_t row = 0; row < height; ++row) {
    memmove(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch,
            width);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* target, const void*, size_t size, size_t, cudaMemcpyKind) {
  unsafe(format("cudaMemcpyFromSymbol bytes=%zu", size));
  memset(target, 0, size);  // variables of device code are nowhere; what asks for one must not find what lay there
  return cudaSuccess;
}
cudaError_t cudaMemset(void* target, int value, size_t size) {
  unsafe(format("cudaMemset bytes=%zu", size));
  memset(target, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  if (!launch(format("cudaMemsetAsync bytes=%zu", size), stream)) memset(target, value, size);
  return cudaSuccess;
}

}  // extern "C"
