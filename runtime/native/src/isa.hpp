// Which instruction set is used.
#pragma once

#include <string>

#include "kernels.hpp"

namespace tarflow::native {

// The best this machine has, or the one that TARFLOW_ISA names. Throws Wrong if that is none, or not of this machine.
const Kernels& best_kernels();

}  // namespace tarflow::native
