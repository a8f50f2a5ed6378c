// x86-64 with AVX-512 and its products of bytes.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#define TARFLOW_VNNI
#define TARFLOW_ISA avx512_vnni
#include "vector_avx512.hpp"
#include "kernels.inc"

namespace tarflow::native {

const Kernels& kernels_of_avx512_vnni() {
  using namespace TARFLOW_ISA;
  static constexpr Kernels kernels = {"avx512_vnni", normalise, to_bytes, multiply, gelu_all, add_all, keep, attend, affine};
  return kernels;
}

}  // namespace tarflow::native
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
