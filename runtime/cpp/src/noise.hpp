// Noise that is a function of (seed, sample), to the last bit: FORMAT.md, "Noise".
#pragma once

#include <cstddef>
#include <cstdint>

namespace tarflow::internal {

constexpr std::uint32_t kSampling = 0;  // stream; 1 to 8 draw a sample again

// `count` standard normal numbers of one sample.
void normal(std::uint64_t seed, std::uint64_t sample, std::uint32_t stream, std::size_t count, float* out);

}  // namespace tarflow::internal
