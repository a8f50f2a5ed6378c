// Streams, events, and graphs, of which only the number of nodes is kept.
#include <unistd.h>

#include <cstdlib>

#include "state.hpp"

using namespace standin;

namespace {

template <class T>
cudaError_t created(const char* call, T* made) {
  *made = handle<T>();
  standin_note(format("%s made=%p", call, static_cast<void*>(*made)).c_str());
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* made) { return created("cudaStreamCreate", made); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned) { return created("cudaStreamCreate", made); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  standin_note(format("cudaStreamDestroy stream=%p", static_cast<void*>(stream)).c_str());
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  unsafe(format("cudaStreamSynchronize stream=%p", static_cast<void*>(stream)));
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* made) { return *made = handle<cudaEvent_t>(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) { return cudaEventCreate(made); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return unsafe("cudaEventSynchronize"), cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  write(format("cudaStreamBeginCapture stream=%p mode=%d", static_cast<void*>(stream), static_cast<int>(mode)));
  state().captures[stream] = {mode, thread(), 0};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (const char* linger = getenv("STANDIN_LINGER")) usleep(static_cast<useconds_t>(atoi(linger)));
  *graph = handle<cudaGraph_t>();
  const std::lock_guard<std::mutex> lock(state().mutex);
  write(format("cudaStreamEndCapture stream=%p made=%p nodes=%zu", static_cast<void*>(stream),
               static_cast<void*>(*graph), state().captures[stream].nodes));
  state().captures.erase(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  *status = state().captures.count(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t, unsigned long long) {
  return created("cudaGraphInstantiate", made);
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  standin_note(format("cudaGraphExecDestroy graph=%p", static_cast<void*>(graph)).c_str());
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  launch(format("cudaGraphLaunch graph=%p", static_cast<void*>(graph)), stream);
  return cudaSuccess;
}

}  // extern "C"
