// Any bytes as a graph: one that may be opened, or Error(TARFLOW_BUNDLE).
#include <cstdlib>

#include "error.hpp"
#include "graph.hpp"

using namespace tarflow::internal;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    check_graph({reinterpret_cast<const char*>(data), size}, "graph.onnx", 1 << 20);
  } catch (const Error& error) {
    if (error.status != TARFLOW_BUNDLE || error.what()[0] == '\0') std::abort();
  }
  return 0;
}
