// x86-64 with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.hpp"

#define TARFLOW_ISA avx512
TARFLOW_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "vector_avx512.hpp"
#include "kernels.inc"
TARFLOW_END_TARGET
#endif
