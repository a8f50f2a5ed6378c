// A stand-in for CUDA's runtime library: pretended GPUs whose memory is the host's. Kernels are noted and not run, a
// graph is the number of its nodes, everything else does what it says. What matters is a line of $STANDIN_LOG:
//
//     THREAD CALL [KEY=VALUE ...] [captured] [bad=REASON]
//
// captured: it became a node of a graph. bad, during a capture: "unsafe", CUDA refuses it in this mode of capture;
// "elsewhere", the capturing thread puts work where the graph does not have it; "pageable", a copy that CUDA may make
// wait for the device, which it then refuses. A bad call is carried out all the same, so that all of them are seen.
//
// $STANDIN_DEVICES: how many GPUs there are, if not one.
// $STANDIN_LINGER: microseconds a capture lasts longer, for calls of other threads to fall into.
// $STANDIN_KERNELS: if set, a line for every container of device code and every kernel in it, as they are registered.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

#include "launch.hpp"

namespace standin {

constexpr size_t kMemory = size_t{80} << 30;
constexpr int kMajor = 9, kMinor = 0;  // compute capability

using Regions = std::map<const char*, size_t>;  // sizes by address

struct Kernel {
  std::string name;
  int container;
};

struct Capture {
  cudaStreamCaptureMode mode;
  long thread;
  size_t nodes;
};

struct State {
  std::mutex mutex;
  Regions device, pinned;
  size_t used = 0, handles = 0x1000;
  std::map<cudaStream_t, Capture> captures;
  std::map<const void*, Kernel> kernels;  // by the function that launches them on the host
  std::map<void**, int> containers;
};

extern thread_local int device;  // the thread's own

State& state();
long thread();
cudaError_t failed(cudaError_t error);  // what cudaGetLastError() returns next, in this thread
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// The mutex is held by whoever calls these two.
void write(const std::string& line);
const char* place(const void* address);

// And by nobody who calls these.
void unsafe(const std::string& line);  // a call that may wait for the device
size_t number();                       // one that no object has yet
// Work on a stream. True: it was captured, and must not be carried out now.
bool launch(const std::string& line, cudaStream_t stream, bool pageable = false);

template <class T>
T handle() {
  return reinterpret_cast<T>(number());
}

}  // namespace standin
