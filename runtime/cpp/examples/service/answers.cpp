#include "answers.hpp"

#include <png.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

namespace {

using Json = nlohmann::json;

// All images in one row.
std::string png(const std::vector<float>& images, std::size_t n, const tarflow_shape& shape) {
  const auto side = static_cast<std::size_t>(shape.image_size);
  const std::size_t channels = shape.channels == 3 ? 3 : 1, width = side * n, pixels = side * side;
  std::vector<png_byte> bytes(width * side * channels);
  for (std::size_t i = 0; i < n; ++i) {
    const float* image = images.data() + i * static_cast<std::size_t>(shape.image_numbers);
    for (std::size_t at = 0; at < pixels * channels; ++at) {
      const std::size_t channel = at / pixels, y = at % pixels / side, x = at % side;
      const float value = std::min(255.0F, std::max(0.0F, (image[at] + 1) * 127.5F + 0.5F));
      bytes[((y * width) + i * side + x) * channels + channel] = static_cast<png_byte>(value);
    }
  }
  png_image header{};
  header.version = PNG_IMAGE_VERSION;
  header.width = static_cast<png_uint_32>(width);
  header.height = static_cast<png_uint_32>(side);
  header.format = channels == 3 ? PNG_FORMAT_RGB : PNG_FORMAT_GRAY;
  png_alloc_size_t size = 0;
  std::string file;
  if (png_image_write_to_memory(&header, nullptr, &size, 0, bytes.data(), 0, nullptr) != 0) {
    file.resize(size);
    if (png_image_write_to_memory(&header, file.data(), &size, 0, bytes.data(), 0, nullptr) != 0)
      return file.substr(0, size);
  }
  throw Refusal{500, header.message};
}

// Samples of a finished job that are not finite, as a list of their indices; "" if there are none.
std::string nonfinite(const Job& job, const tarflow_shape& shape, Metrics& metrics) {
  const auto numbers = static_cast<std::ptrdiff_t>(shape.image_numbers);
  std::uint64_t broken = 0;
  std::string indices;
  for (std::size_t i = 0; i < job.labels.size(); ++i) {
    const auto image = job.images.begin() + static_cast<std::ptrdiff_t>(i) * numbers;
    if (std::all_of(image, image + numbers, [](float number) { return std::isfinite(number); })) continue;
    if (++broken <= 100) indices += (broken > 1 ? "," : "") + std::to_string(job.index + i);
  }
  if (broken == 0) return "";
  if (broken > 100) indices += ",...";
  metrics.nonfinite += broken;
  std::cerr << "service: " + std::to_string(broken) + " of " + std::to_string(job.labels.size()) + " samples of seed " +
                   std::to_string(job.seed) + " are not finite (" + indices + ")\n";
  return indices;
}

}  // namespace

void answer(httplib::Response& response, const Job& job, const tarflow_shape& shape, Metrics& metrics) {
  const std::size_t n = job.labels.size();
  const std::string side = std::to_string(shape.image_size);
  response.set_header("X-Tarflow-Shape",
                      std::to_string(n) + "," + std::to_string(shape.channels) + "," + side + "," + side);
  const std::string broken = nonfinite(job, shape, metrics);
  if (!broken.empty()) response.set_header("X-Tarflow-Nonfinite", broken);
  if (job.raw) {
    response.set_content(reinterpret_cast<const char*>(job.images.data()), job.images.size() * sizeof(float),
                         "application/octet-stream");
    return;
  }
  if (!broken.empty()) {
    throw Refusal{422, "samples " + broken +
                           " are not finite and make no picture; use weaker guidance, other "
                           "samples of the seed, or format raw, which keeps them"};
  }
  response.set_content(png(job.images, n, shape), "image/png");
}

void refuse(httplib::Response& response, const Refusal& refusal) {
  response.status = refusal.code;
  if (refusal.code == 429) response.set_header("Retry-After", "1");
  response.set_content(Json{{"error", refusal.message}}.dump(-1, ' ', false, Json::error_handler_t::replace),
                       "application/json");
}
