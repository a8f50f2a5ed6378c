// Any bytes as the header of weights.safetensors, the first eight saying how many bytes of tensors follow.
#include <cstdlib>
#include <cstring>

#include "error.hpp"
#include "manifest.hpp"

using namespace tarflow::internal;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 8) return 0;
  std::uint64_t room = 0;
  std::memcpy(&room, data, 8);
  try {
    const WeightsHeader header =
        read_weights_header({reinterpret_cast<const char*>(data) + 8, size - 8}, room, "weights");
    if (header.shape.tokens() < 1) std::abort();
    const double bytes = 4.0 * double(header.shape.tokens()) * double(header.shape.patch_dim());
    if (double(header.variance) + bytes > double(room)) std::abort();
  } catch (const Error& error) {
    if (error.status != TARFLOW_BUNDLE || error.what()[0] == '\0') std::abort();
  }
  return 0;
}
