// Any machine: one lane after the other.
#include "kernels.hpp"

#define TARFLOW_ISA baseline
#include "vector_scalar.hpp"
#include "kernels.inc"
