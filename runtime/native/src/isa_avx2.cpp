// x86-64 with AVX2 and fused multiply-add.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.hpp"

#define TARFLOW_ISA avx2
TARFLOW_TARGET("avx2,fma")
#include "vector_avx2.hpp"
#include "kernels.inc"
TARFLOW_END_TARGET
#endif
