// Armv8.2 with its products of bytes.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.hpp"

#define TARFLOW_ISA neon
#if defined(__clang__)
TARFLOW_TARGET("dotprod")
#else
TARFLOW_TARGET("arch=armv8.2-a+dotprod")
#endif
#include "vector_neon.hpp"
#include "kernels.inc"
TARFLOW_END_TARGET
#endif
