// A model and noise that a counter makes: whole numbers decide every weight, so all machines make the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "native.h"

namespace synthetic {

using Sizes = std::vector<std::int64_t>;
using Shape = tarflow_native_shape;

// Numbers in [-1, 1), the i-th of a stream a function of i alone (SplitMix64).
class Stream {
 public:
  explicit Stream(std::uint64_t seed) : counter_(seed << 32) {}

  float next() {
    std::uint64_t bits = ++counter_ * 0x9E3779B97F4A7C15u;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
    return static_cast<float>(static_cast<std::int64_t>((bits ^ bits >> 31) >> 40) - (1 << 23)) * 0x1p-23f;
  }

 private:
  std::uint64_t counter_;
};

// The bytes of a weights.safetensors, tensor by tensor.
class File {
 public:
  // Of numbers around `middle`, `reach` to either side at most.
  void add(const std::string& name, const Sizes& shape, float middle, float reach) {
    std::string sizes;
    std::int64_t count = 1;
    for (const std::int64_t size : shape) {
      sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
      count *= size;
    }
    const std::size_t begin = data_.size();
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = std::fma(reach, stream_.next(), middle);  // one rounding, whatever the compiler likes
      char bytes[4];
      std::memcpy(bytes, &value, 4);
      data_.append(bytes, 4);
    }
    header_ += (header_.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"F32\",\"shape\":[" + sizes +
               "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(data_.size()) + "]}";
  }

  void linear(const std::string& name, std::int64_t outputs, std::int64_t inputs, float gain = 1) {
    add(name + ".weight", {outputs, inputs}, 0, gain * std::sqrt(3.0f / static_cast<float>(inputs)));
    add(name + ".bias", {outputs}, 0, 0.1f);
  }

  void norm(const std::string& name, std::int64_t width) {
    add(name + ".weight", {width}, 1, 0.2f);
    add(name + ".bias", {width}, 0, 0.2f);
  }

  std::string content() const {
    std::string length(8, '\0');
    for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>((header_.size() + 1) >> (8 * i));
    return length + header_ + "}" + data_;
  }

 private:
  Stream stream_{1};
  std::string header_, data_;
};

inline std::string weights(const Shape& shape) {
  File file;
  for (std::int64_t k = 0; k < shape.blocks; ++k) {
    const std::string block = "blocks." + std::to_string(k) + ".";
    file.linear(block + "proj_in", shape.width, shape.patch_dim);
    file.linear(block + "proj_out", (shape.nvp != 0 ? 2 : 1) * shape.patch_dim, shape.width, 0.1f);
    file.add(block + "pos_embed", {shape.tokens, shape.width}, 0, 0.5f);
    if (shape.classes > 0) {
      file.add(block + "class_embed", {shape.classes, 1, shape.width}, 0, 0.5f);
      file.add("derived." + block + "null_class", {1, shape.width}, 0, 0.5f);
    }
    for (std::int64_t l = 0; l < shape.layers; ++l) {
      const std::string layer = block + "attn_blocks." + std::to_string(l) + ".";
      file.norm(layer + "attention.norm", shape.width);
      file.linear(layer + "attention.qkv", 3 * shape.width, shape.width);
      file.linear(layer + "attention.proj", shape.width, shape.width);
      file.norm(layer + "mlp.norm", shape.width);
      file.linear(layer + "mlp.main.0", 4 * shape.width, shape.width);
      file.linear(layer + "mlp.main.2", shape.width, 4 * shape.width);
    }
  }
  return file.content();
}

// Samples first ... first + images - 1 of one noise, each with a label of its own, guided or not; decoded position after
// position, or in windows.
struct Draw {
  std::int64_t first = 0, images = 1;
  bool guided = false;
  std::int64_t window = 1;
};

// One block: x of z, (B, T, D) in block order. Returns the code of a failure, else 0.
inline int decode(tarflow_native_model* model, const Shape& shape, std::int64_t block, const Draw& draw,
                  std::vector<float>& x) {
  const std::int64_t branches = draw.guided ? 2 : 1, last = shape.tokens - 1, patch_dim = shape.patch_dim;
  std::vector<std::int64_t> labels(static_cast<std::size_t>(branches * draw.images), -1);
  for (std::int64_t i = 0; i < draw.images; ++i)
    labels[static_cast<std::size_t>(i)] = shape.classes > 0 ? (draw.first + i) % (shape.classes + 1) - 1 : -1;
  std::vector<float> mix;
  for (int part = 0; part < 2; ++part)
    for (std::int64_t g = 0; g < branches; ++g)
      for (std::int64_t t = 0; t < shape.tokens; ++t) {
        const float scale = draw.guided ? 0.125f * static_cast<float>(t) : 0.0f;
        mix.push_back(g == 0 ? 1 + scale : -scale);
      }
  const std::vector<float> inverse_temperature = {1.0f, 0.75f};
  const tarflow_native_batch batch = {draw.images, branches, x.data(), labels.data(), mix.data(), inverse_temperature.data()};
  tarflow_native_decoding* decoding = nullptr;
  int code = tarflow_native_begin(model, block, &batch, &decoding);
  if (code != 0) return code;
  float* found = tarflow_native_x(decoding);
  if (draw.window == 1) code = tarflow_native_run(decoding, 0, last);
  for (std::int64_t position = 0; draw.window > 1 && position < last && code == 0; position += draw.window) {
    const std::int64_t window = position + draw.window < last ? draw.window : last - position;
    std::vector<float> next(static_cast<std::size_t>(draw.images * window * patch_dim));
    for (std::int64_t sweep = 0; sweep < window && code == 0; ++sweep) {  // each makes one more position right
      code = tarflow_native_evaluate(decoding, position, window, nullptr, next.data());
      for (std::int64_t i = 0; i < draw.images; ++i)
        std::memcpy(found + (i * shape.tokens + position + 1) * patch_dim, next.data() + i * window * patch_dim,
                    static_cast<std::size_t>(window * patch_dim) * sizeof(float));
    }
  }
  std::memcpy(x.data(), found, x.size() * sizeof(float));
  tarflow_native_end(decoding);
  return code;
}

// All blocks, the last first; empty if one fails.
inline std::vector<float> samples(tarflow_native_model* model, const Shape& shape, const Draw& draw) {
  std::vector<float> x;
  for (std::int64_t i = 0; i < draw.images; ++i) {
    Stream noise(static_cast<std::uint64_t>(draw.first + i + 2));
    for (std::int64_t k = 0; k < shape.tokens * shape.patch_dim; ++k) x.push_back(2 * noise.next());
  }
  for (std::int64_t block = shape.blocks; block-- > 0;)
    if (decode(model, shape, block, draw, x) != 0) return {};
  return x;
}

// FNV-1a over the numbers' bits.
inline std::uint64_t hash(const std::vector<float>& numbers) {
  std::uint64_t value = 0xcbf29ce484222325u;
  for (const float number : numbers) {
    std::uint32_t bits;
    std::memcpy(&bits, &number, 4);
    for (int i = 0; i < 32; i += 8) value = (value ^ (bits >> i & 255)) * 0x100000001b3u;
  }
  return value;
}

// Sizes that are no multiples of anything: padding everywhere.
constexpr Shape kOdd = {13, 5, 72, 24, 2, 2, 3, 1};

}  // namespace synthetic
