// Any machine: one lane after the other.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#define TARFLOW_ISA baseline
#include "vector_scalar.hpp"
#include "kernels.inc"

namespace tarflow::native {

const Kernels& kernels_of_baseline() {
  using namespace TARFLOW_ISA;
  static constexpr Kernels kernels = {"baseline", normalise, to_bytes, multiply, gelu_all, add_all, keep, attend, affine};
  return kernels;
}

}  // namespace tarflow::native
