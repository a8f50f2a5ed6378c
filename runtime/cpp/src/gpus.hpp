// The GPUs that CUDA has here, by its driver's word, in the order in which programs number them.
#pragma once

#include <string>

namespace tarflow::internal {

// The number of a device that is named by number or UUID, of which a beginning that fits one will do; the first one's
// if `device` is empty. Throws Error(TARFLOW_INPUT) for one that CUDA does not have here.
int numbered_gpu(const std::string& device);

}  // namespace tarflow::internal
