// x86-64 with AVX2 and fused multiply-add.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TARFLOW_ISA avx2
#include "vector_avx2.hpp"
#include "kernels.inc"

namespace tarflow::native {

const Kernels& kernels_of_avx2() {
  using namespace TARFLOW_ISA;
  static constexpr Kernels kernels = {"avx2", normalise, to_bytes, multiply, gelu_all, add_all, keep, attend, affine};
  return kernels;
}

}  // namespace tarflow::native
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
