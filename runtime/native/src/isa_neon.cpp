// Armv8.2 with its products of bytes.
#if defined(__aarch64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <arm_neon.h>

#include "kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define TARFLOW_ISA neon
#include "vector_neon.hpp"
#include "kernels.inc"

namespace tarflow::native {

const Kernels& kernels_of_neon() {
  using namespace TARFLOW_ISA;
  static constexpr Kernels kernels = {"neon", normalise, to_bytes, multiply, gelu_all, add_all, keep, attend, affine};
  return kernels;
}

}  // namespace tarflow::native
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
