#include "state.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace standin {
namespace {

thread_local cudaError_t last = cudaSuccess;

bool holds(const Regions& regions, const void* address) {
  auto next = regions.upper_bound(static_cast<const char*>(address));
  if (next == regions.begin()) return false;
  --next;
  return static_cast<const char*>(address) < next->first + next->second;
}

// Whether a capture that goes on makes CUDA refuse what may wait for the device, in this thread.
bool refused() {
  for (const auto& [stream, capture] : state().captures) {
    if (capture.mode == cudaStreamCaptureModeGlobal) return true;
    if (capture.mode == cudaStreamCaptureModeThreadLocal && capture.thread == thread()) return true;
  }
  return false;
}

bool capturing() {
  for (const auto& [stream, capture] : state().captures) {
    if (capture.thread == thread()) return true;
  }
  return false;
}

}  // namespace

thread_local int device = 0;

State& state() {  // never destroyed: libraries call in when the process ends
  static State* const all = new State;
  return *all;
}

long thread() { return syscall(SYS_gettid); }

cudaError_t failed(cudaError_t error) { return last = error; }

std::string format(const char* text, ...) {
  char line[4096];
  va_list values;
  va_start(values, text);
  vsnprintf(line, sizeof line, text, values);
  va_end(values);
  return line;
}

void write(const std::string& line) {
  static FILE* const file = [] {
    const char* path = getenv("STANDIN_LOG");
    FILE* opened = path == nullptr ? nullptr : fopen(path, "a");
    if (opened != nullptr) setvbuf(opened, nullptr, _IOLBF, 1 << 16);
    return opened;
  }();
  if (file != nullptr) fprintf(file, "%ld %s\n", thread(), line.c_str());
}

const char* place(const void* address) {
  if (holds(state().device, address)) return "device";
  return holds(state().pinned, address) ? "pinned" : "pageable";
}

void unsafe(const std::string& line) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  write(line + (refused() ? " bad=unsafe" : ""));
}

bool launch(const std::string& line, cudaStream_t stream, bool pageable) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const std::string words = line + format(" stream=%p", static_cast<void*>(stream));
  const auto found = state().captures.find(stream);
  if (found != state().captures.end()) {
    ++found->second.nodes;
    write(words + " captured");
    return true;
  }
  write(words + (capturing() ? " bad=elsewhere" : pageable && refused() ? " bad=pageable" : ""));
  return false;
}

size_t number() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return ++state().handles;
}

}  // namespace standin

extern "C" {

void standin_note(const char* text) {
  const std::lock_guard<std::mutex> lock(standin::state().mutex);
  standin::write(text);
}

void standin_launch(const char* text, void* stream) { standin::launch(text, static_cast<cudaStream_t>(stream)); }

void standin_absent(const char* call) { standin_note(standin::format("absent call=%s", call).c_str()); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = standin::last;
  standin::last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return standin::last; }

}  // extern "C"
