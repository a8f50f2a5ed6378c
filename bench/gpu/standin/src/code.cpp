// Device code: registered as libraries are loaded, named in the log when it is launched, never run.
#include <dlfcn.h>

#include <cstdlib>
#include <vector>

#include "state.hpp"

using namespace standin;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

cudaError_t run(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  Kernel kernel = {"unknown", -1};
  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    const auto found = state().kernels.find(function);
    if (found != state().kernels.end()) kernel = found->second;
  }
  const std::string shape = format("container=%d grid=%u,%u,%u block=%u,%u,%u shared=%zu", kernel.container, grid.x,
                                   grid.y, grid.z, block.x, block.y, block.z, shared);
  launch("kernel " + shape + " name=" + kernel.name, stream);
  return cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  void** const made = new void*(wrapper);
  const void* const data = static_cast<void**>(wrapper)[1];
  Dl_info library = {};
  dladdr(data, &library);
  const std::lock_guard<std::mutex> lock(state().mutex);
  const int number = static_cast<int>(state().containers.size());
  state().containers[made] = number;
  if (getenv("STANDIN_KERNELS") != nullptr) {
    const auto offset = static_cast<const char*>(data) - static_cast<const char*>(library.dli_fbase);
    write(format("container number=%d at=%td library=%s", number, offset, library.dli_fname));
  }
  return made;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** made, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const int container = state().containers[made];
  state().kernels[host] = {name, container};
  if (getenv("STANDIN_KERNELS") != nullptr) write(format("registered container=%d name=", container) + name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration pushed = configurations.back();
  configurations.pop_back();
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return run(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return run(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t stream) {
  return run(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void**) {
  return run(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!launch("cudaLaunchHostFunc", stream)) function(data);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024, found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 10 * kMajor + kMinor;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

}  // extern "C"
