// The backend on TensorRT engines built from the bundle; compiled only where TensorRT's headers and CUDA were found.
#pragma once

#include <memory>

#include "../backend.hpp"
#include "bundle.hpp"
#include "opening.hpp"

namespace tarflow::internal {

// Throws Error: TARFLOW_MACHINE without a device or in a library built without TensorRT, TARFLOW_BUNDLE without
// engines that fit.
std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const Opening& opening);

}  // namespace tarflow::internal
