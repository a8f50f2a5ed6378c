// Any bytes as weights of a model of any sizes: a step of what opens, or a code and a message.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "native.h"

namespace {

constexpr std::size_t kSizes = 12;  // bytes that are sizes; then the file

// Small, or what no file bears out.
std::int64_t size_of(std::uint8_t byte) {
  constexpr std::int64_t kHostile[] = {-1, std::int64_t{1} << 20, std::int64_t{1} << 40, INT64_MAX, INT64_MIN};
  return byte < 251 ? byte : kHostile[byte - 251];
}

bool failed(int code) {
  if (code != TARFLOW_NATIVE_OK && tarflow_native_message()[0] == '\0') std::abort();
  return code != TARFLOW_NATIVE_OK;
}

// A step, and a window of two.
void decode(tarflow_native_model* model, const tarflow_native_shape& shape, std::int64_t images, std::int64_t branches) {
  const double numbers = double(images) * double(shape.tokens) * double(shape.patch_dim);
  const bool believable = numbers > 0 && numbers < 1 << 24;  // else weights of such sizes are no file's
  const std::vector<float> z(believable ? static_cast<std::size_t>(numbers) : 0, 0.5F);
  const std::vector<float> mix(believable ? static_cast<std::size_t>(2 * branches * shape.tokens) : 0, 1.0F);
  const std::vector<float> inverse_temperature(64, 1.0F);
  std::vector<std::int64_t> labels(static_cast<std::size_t>(images * branches), 1);
  labels.front() = -1;
  const tarflow_native_batch batch = {images, branches, z.data(), labels.data(), mix.data(), inverse_temperature.data()};
  tarflow_native_decoding* decoding = nullptr;
  if (failed(tarflow_native_begin(model, shape.blocks - 1, &batch, &decoding))) return;
  failed(tarflow_native_run(decoding, 0, 1));
  std::vector<float> found(static_cast<std::size_t>(2 * images * shape.patch_dim));
  failed(tarflow_native_evaluate(decoding, 0, 2, nullptr, found.data()));
  failed(tarflow_native_run(decoding, shape.tokens - 2, shape.tokens - 1));
  tarflow_native_end(decoding);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kSizes) return 0;
  const tarflow_native_shape shape = {size_of(data[0]), size_of(data[1]), size_of(data[2]), size_of(data[3]),
                                      size_of(data[4]), size_of(data[5]), size_of(data[6]), data[7] & 1};
  const std::vector<std::int32_t> precisions(256, data[8] % 5);  // one of them is none
  if (shape.blocks > 256) return 0;                              // a caller has one for each
  setenv("TARFLOW_ISA", data[9] % 2 == 0 ? "baseline" : "", 1);
  const std::vector<std::uint8_t> file(data + kSizes, data + size);  // of its own, so that reading past it is seen
  tarflow_native_model* model = nullptr;
  if (failed(tarflow_native_open(file.data(), file.size(), &shape, precisions.data(), 1, data[9] / 2 % 2, &model))) return 0;
  decode(model, shape, 1 + data[10] % 3, 1 + data[11] % 2);
  tarflow_native_close(model);
  return 0;
}
