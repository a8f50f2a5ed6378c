// The backend on TensorRT engines built from the bundle; compiled only where TensorRT's headers and CUDA were found.
#pragma once

#include "backend.hpp"

namespace tarflow::internal {

// Throws Error: TARFLOW_MACHINE without a device or in a library built without TensorRT, TARFLOW_BUNDLE without
// engines that fit.
std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, bool low_memory, bool cuda_graph);

}  // namespace tarflow::internal
