// Pretended GPUs, of the size and capability of a large one, and the errors of the runtime.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "state.hpp"

using namespace standin;

namespace {

constexpr int kProcessors = 132, kSharedOptIn = 232448, kSharedUsual = 49152;

}  // namespace

extern "C" {

int standin_devices() {
  const char* const said = getenv("STANDIN_DEVICES");
  return said == nullptr ? 1 : atoi(said);
}
void standin_describe(int number, char* name, size_t size, unsigned char* uuid) {
  snprintf(name, size, "a pretended GPU %d", number);
  memset(uuid, 0x10 * (number + 1), 16);
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = standin_devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int* number) { return *number = device, cudaSuccess; }
cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= standin_devices()) return failed(cudaErrorInvalidDevice);
  return device = number, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int number) {
  *found = {};
  standin_describe(number, found->name, sizeof found->name, reinterpret_cast<unsigned char*>(&found->uuid));
  found->totalGlobalMem = kMemory;
  found->major = kMajor, found->minor = kMinor, found->multiProcessorCount = kProcessors;
  found->sharedMemPerBlock = kSharedUsual, found->sharedMemPerBlockOptin = kSharedOptIn;
  found->sharedMemPerMultiprocessor = kSharedOptIn + 1024, found->reservedSharedMemPerBlock = 1024;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536, found->totalConstMem = 65536;
  found->warpSize = 32, found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048, found->maxBlocksPerMultiProcessor = 32;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->l2CacheSize = 50 << 20;
  found->unifiedAddressing = found->concurrentKernels = found->cooperativeLaunch = found->canMapHostMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cudaDeviceProp all;
  cudaGetDeviceProperties(&all, 0);
  const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrComputeCapabilityMajor, all.major},
      {cudaDevAttrComputeCapabilityMinor, all.minor},
      {cudaDevAttrMultiProcessorCount, all.multiProcessorCount},
      {cudaDevAttrMaxSharedMemoryPerBlock, int(all.sharedMemPerBlock)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(all.sharedMemPerBlockOptin)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int(all.sharedMemPerMultiprocessor)},
      {cudaDevAttrMaxThreadsPerBlock, all.maxThreadsPerBlock},
      {cudaDevAttrMaxThreadsPerMultiProcessor, all.maxThreadsPerMultiProcessor},
      {cudaDevAttrMaxGridDimX, all.maxGridSize[0]},
      {cudaDevAttrMaxGridDimY, all.maxGridSize[1]},
      {cudaDevAttrMaxGridDimZ, all.maxGridSize[2]},
      {cudaDevAttrWarpSize, all.warpSize},
      {cudaDevAttrL2CacheSize, all.l2CacheSize},
      {cudaDevAttrMemoryPoolsSupported, 0},
  };
  const auto found = known.find(attribute);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  *total = kMemory, *free = kMemory - state().used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  *found = {};
  const std::string_view where = place(address);
  found->type = cudaMemoryTypeUnregistered;
  if (where == "device") found->type = cudaMemoryTypeDevice;
  if (where == "pinned") found->type = cudaMemoryTypeHost;
  found->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return unsafe("cudaDeviceSynchronize"), cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOfAnotherKind";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the stand-in for CUDA";
}

}  // extern "C"
