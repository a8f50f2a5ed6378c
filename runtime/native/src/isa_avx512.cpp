// x86-64 with AVX-512.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define TARFLOW_ISA avx512
#include "vector_avx512.hpp"
#include "kernels.inc"

namespace tarflow::native {

const Kernels& kernels_of_avx512() {
  using namespace TARFLOW_ISA;
  static constexpr Kernels kernels = {"avx512", normalise, to_bytes, multiply, gelu_all, add_all, keep, attend, affine};
  return kernels;
}

}  // namespace tarflow::native
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
