// What an instruction set does for a step: each function computes the same numbers on all of them, to the bit.
//
// Shapes: C width, d head dimension, K inputs of a product, S slots of a cache. Rows of activations are padded to whole
// panels; the padding is zero.
#pragma once

#include <cmath>  // with the others here, for no target: what is inline in them may be kept from any file
#include <cstddef>
#include <cstdint>
#include <cstring>

#define TARFLOW_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define TARFLOW_TARGET(names) TARFLOW_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define TARFLOW_END_TARGET TARFLOW_PRAGMA(clang attribute pop)
#define TARFLOW_UNROLLED _Pragma("unroll")
#else
#define TARFLOW_TARGET(names) TARFLOW_PRAGMA(GCC target(names))
#define TARFLOW_END_TARGET
#define TARFLOW_UNROLLED _Pragma("GCC unroll 8")  // early enough for sums in arrays to be kept in registers
#endif

namespace tarflow::native {

constexpr std::int64_t kPanel = 64;  // outputs whose weights lie together
constexpr std::int64_t kGroup = 64;  // inputs that share a scale, where weights or activations are whole numbers
constexpr std::int64_t kLanes = 16;

inline std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
inline std::int64_t groups_of(std::int64_t inputs) { return padded(inputs, kGroup) / kGroup; }

enum class Precision : std::int32_t { fp32, int16, bf16, int8 };

struct Bfloat16 {
  std::uint16_t bits;
};

// Weights (N, K) of a product, in panels of 64 outputs: float, int16 or bfloat16 (K, 64); bytes (K / 4, 64, 4), 128 added.
struct Panels {
  Precision precision = Precision::fp32;
  std::int64_t inputs = 0, count = 0;   // K, and the panels
  const std::uint8_t* weights = nullptr;
  std::int64_t stride = 0;              // bytes of a panel
  const float* scales = nullptr;        // (panels, groups, 64) where weights are whole numbers
  const float* bias = nullptr;          // (panels, 64)
};

// What is multiplied: floats (count, stride), or for bytes levels (count, 64 groups), and by row and group their scale
// and their sum.
struct Rows {
  std::int64_t count = 0;
  const float* x = nullptr;
  std::int64_t stride = 0;
  const std::int8_t* levels = nullptr;
  const float* scales = nullptr;
  const std::int32_t* sums = nullptr;
};

// Keys and values of one sequence, layer and head. Keys lie by sixteen slots, (S / 16, d, 16); values by slot, (S, d
// padded to 16). As bytes: keys (S / 16, d / 4, 16, 4), 128 added; values (S / 2, d, 2); a scale for each slot.
struct Slots {
  float *keys = nullptr, *values = nullptr;
  std::uint8_t* byte_keys = nullptr;
  std::int8_t* byte_values = nullptr;
  float *key_scales = nullptr, *value_scales = nullptr;
};

// The branches' outputs for one patch, and what weighs them: mix (2, G, T) at one step.
struct Outputs {
  const float* out = nullptr;  // (G, ...): log_scale, then shift; shift alone without `nvp`
  std::int64_t branches = 0, stride = 0;
  const float* mix = nullptr;
  std::int64_t tokens = 0;
  bool nvp = true;
};

struct Kernels {
  const char* name;
  // LayerNorm of one row, (C) -> (C padded to 64). epsilon is PyTorch's.
  void (*normalise)(const float* h, const float* gain, const float* bias, std::int64_t width, float* out);
  // A row of 64 n numbers -> whole numbers in -127 ... 127 and for each group of 64 its scale, nan if one is not finite.
  void (*to_bytes)(const float* x, std::int64_t groups, std::int8_t* levels, float* scales, std::int32_t* sums);
  // One panel of a product and its bias: (rows, 64).
  void (*multiply)(const Panels& weights, std::int64_t panel, const Rows& rows, float* out);
  void (*gelu)(float* x, std::int64_t n);
  void (*add)(float* x, const float* y, std::int64_t n);  // x += y
  void (*keep)(const Slots& slots, std::int64_t slot, std::int64_t head_dim, const float* key, const float* value);
  // Attention of one query, scaled, to the first n slots: (d padded to 16). `scratch` holds S padded to 64, and d + 64, numbers.
  void (*attend)(const Slots& slots, std::int64_t n, std::int64_t head_dim, const float* query, float* out,
                 float* scratch);
  // One patch of D numbers: z exp(log_scale) + shift.
  void (*affine)(const Outputs& outputs, std::int64_t patch_dim, const float* z, float* x);
};

// One for each instruction set, as kernels.inc defines them.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

}  // namespace tarflow::native
