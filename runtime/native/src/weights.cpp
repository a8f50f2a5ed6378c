#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tarflow::native {
namespace {

// The nearest whole number, ties to even: |x| is below 2^22.
float nearest(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

std::int64_t bytes_of(Precision precision) {
  return precision == Precision::fp32 ? 4 : precision == Precision::int8 ? 1 : 2;
}

std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;  // rounding up would make a number of some nans
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The file's rows in their order.
std::vector<std::int64_t> as_they_are(std::int64_t outputs) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(padded(outputs, kPanel)), -1);
  for (std::int64_t n = 0; n < outputs; ++n) order[static_cast<std::size_t>(n)] = n;
  return order;
}

// Query, key and value of one head behind one another.
std::vector<std::int64_t> by_head(const Shape& shape) {
  const std::int64_t d = shape.head_dim, room = padded(3 * d, kPanel);
  std::vector<std::int64_t> order(static_cast<std::size_t>(shape.heads() * room), -1);
  for (std::int64_t head = 0; head < shape.heads(); ++head)
    for (std::int64_t part = 0; part < 3; ++part)
      for (std::int64_t i = 0; i < d; ++i)
        order[static_cast<std::size_t>(head * room + part * d + i)] = part * shape.width + head * d + i;
  return order;
}

Buffer<float> padded_rows(const std::vector<float>& values, std::int64_t width) {
  const std::int64_t rows = static_cast<std::int64_t>(values.size()) / width, stride = padded(width, kPanel);
  Buffer<float> out(rows * stride);
  for (std::int64_t r = 0; r < rows; ++r) std::copy_n(values.data() + r * width, width, out + r * stride);
  return out;
}

Norm norm_of(const Safetensors& file, const std::string& name, std::int64_t width) {
  return {padded_rows(file.floats(name + ".weight", {width}), width),
          padded_rows(file.floats(name + ".bias", {width}), width)};
}

// What each output is multiplied by, in a bundle exported as int8.
std::string scales_of(const std::string& name) { return "derived." + name + ".weight_scale"; }

// (N, K), or (K, N) where there are scales. Throws Wrong.
const Tensor& weights_of(const Safetensors& file, const std::string& name, std::int64_t outputs, std::int64_t inputs) {
  if (!file.has(scales_of(name))) return file.get(name + ".weight", {outputs, inputs});
  const Tensor& tensor = file.get(name + ".weight", {inputs, outputs});
  if (tensor.type != Type::i8) throw Wrong("tensor '" + name + ".weight' has scales, and is not int8");
  return tensor;
}

}  // namespace

Linear::Linear(const Safetensors& file, const std::string& name, std::int64_t outputs, std::int64_t inputs,
               std::vector<std::int64_t> order, Precision precision)
    : name_(name), outputs_(outputs), order_(std::move(order)) {
  weights_of(file, name, outputs, inputs);
  const std::vector<float> bias = file.floats(name + ".bias", {outputs});
  const std::int64_t groups = groups_of(inputs), count = static_cast<std::int64_t>(order_.size()) / kPanel;
  panels_.precision = precision;
  panels_.inputs = inputs;
  panels_.count = count;
  panels_.stride = (precision == Precision::int8 ? groups * kGroup : inputs) * kPanel * bytes_of(precision);
  if (precision == Precision::int16 || precision == Precision::int8) {
    scales_ = Buffer<float>(count * groups * kPanel);
    panels_.scales = scales_.data();
  }
  bias_ = Buffer<float>(count * kPanel);
  for (std::size_t n = 0; n < order_.size(); ++n)
    if (order_[n] >= 0) bias_[static_cast<std::int64_t>(n)] = bias[static_cast<std::size_t>(order_[n])];
  panels_.bias = bias_.data();
}

void Linear::pack(const Safetensors& file, std::uint8_t* place, Team& team) {
  const Tensor& tensor = weights_of(file, name_, outputs_, panels_.inputs);
  const std::string scales = scales_of(name_);
  const std::vector<float> columns = file.has(scales) ? file.floats(scales, {outputs_}) : std::vector<float>();
  panels_.weights = weights_ = place;
  team.run(panels_.count, static_cast<double>(panels_.inputs) * static_cast<double>(outputs_) * 8,
           [&](std::int64_t panel, int) { pack_panel(tensor, columns, panel); });
}

// One panel: its 64 rows as floats, then as they are kept.
void Linear::pack_panel(const Tensor& tensor, const std::vector<float>& columns, std::int64_t panel) {
  const std::int64_t inputs = panels_.inputs;
  std::vector<float> rows(static_cast<std::size_t>(kPanel * inputs)), own(kPanel, 0.0f);
  for (std::int64_t j = 0; j < kPanel; ++j) {
    const std::int64_t n = order_[static_cast<std::size_t>(panel * kPanel + j)];
    if (n < 0) continue;
    float* row = rows.data() + j * inputs;
    if (columns.empty()) {
      tensor.read(n * inputs, inputs, row);
      continue;
    }
    const std::int64_t outputs = static_cast<std::int64_t>(columns.size());
    own[static_cast<std::size_t>(j)] = columns[static_cast<std::size_t>(n)];
    for (std::int64_t k = 0; k < inputs; ++k) {
      tensor.read(k * outputs + n, 1, row + k);
      if (panels_.precision != Precision::int8) row[k] *= own[static_cast<std::size_t>(j)];
    }
  }
  if (panels_.scales == nullptr)
    pack_numbers(rows.data(), panel);
  else
    pack_levels(rows.data(), columns.empty() ? nullptr : own.data(), panel);
}

void Linear::pack_numbers(const float* rows, std::int64_t panel) {
  std::uint8_t* place = weights_ + panel * panels_.stride;
  for (std::int64_t k = 0; k < panels_.inputs; ++k)
    for (std::int64_t j = 0; j < kPanel; ++j) {
      const float value = rows[j * panels_.inputs + k];
      if (panels_.precision == Precision::fp32)
        reinterpret_cast<float*>(place)[k * kPanel + j] = value;
      else
        reinterpret_cast<Bfloat16*>(place)[k * kPanel + j].bits = to_bfloat16(value);
    }
}

// Rows that came as whole numbers are kept as they are, `columns` their scale.
void Linear::pack_levels(const float* rows, const float* columns, std::int64_t panel) {
  const std::int64_t inputs = panels_.inputs, groups = groups_of(inputs);
  const bool bytes = panels_.precision == Precision::int8;
  const float most = bytes ? 127.0f : 32767.0f;
  std::uint8_t* place = weights_ + panel * panels_.stride;
  if (bytes) std::memset(place, 128, static_cast<std::size_t>(panels_.stride));
  float* scales = scales_ + panel * groups * kPanel;
  for (std::int64_t j = 0; j < kPanel; ++j)
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t stop = std::min(inputs, (g + 1) * kGroup);
      const float* row = rows + j * inputs;
      float top = 0, strange = 0;  // strange becomes nan if a weight is not finite, and with it all that it is in
      for (std::int64_t k = g * kGroup; k < stop; ++k) {
        top = std::max(top, std::fabs(row[k]));
        strange += row[k] * 0.0f;
      }
      const bool kept = bytes && columns != nullptr, sound = top > 1e-30f && strange == 0.0f;
      const float inverse = kept ? 1.0f : sound ? most / top : 0.0f;
      scales[g * kPanel + j] = kept ? columns[j] : (sound ? top / most : 0.0f) + strange;
      for (std::int64_t k = g * kGroup; k < stop; ++k) {
        const int level = inverse == 0.0f ? 0 : static_cast<int>(nearest(row[k] * inverse));
        if (bytes)
          place[(k / 4 * kPanel + j) * 4 + k % 4] = static_cast<std::uint8_t>(level + 128);
        else
          reinterpret_cast<std::int16_t*>(place)[k * kPanel + j] = static_cast<std::int16_t>(level);
      }
    }
}

Block::Block(const Safetensors& file, const Shape& shape, std::int64_t index, Precision kind, Team& team)
    : precision(kind), reversed(index % 2 == 1) {
  const std::int64_t width = shape.width;
  const std::string name = "blocks." + std::to_string(index) + ".";
  const auto linear = [&](const std::string& of, std::int64_t outputs, std::int64_t inputs, Precision in) {
    return Linear(file, name + of, outputs, inputs, as_they_are(outputs), in);
  };
  in = linear("proj_in", width, shape.patch_dim, Precision::fp32);
  out = linear("proj_out", shape.outputs(), width, Precision::fp32);
  positions = padded_rows(file.floats(name + "pos_embed", {shape.tokens, width}), width);
  if (shape.classes > 0) {
    std::vector<float> table = file.floats(name + "class_embed", {shape.classes, 1, width});
    const std::vector<float> null = file.floats("derived." + name + "null_class", {1, width});
    table.insert(table.end(), null.begin(), null.end());
    classes = padded_rows(table, width);
  }
  for (std::int64_t l = 0; l < shape.layers; ++l) {
    const std::string layer = "attn_blocks." + std::to_string(l) + ".";
    layers.push_back({norm_of(file, name + layer + "attention.norm", width),
                      norm_of(file, name + layer + "mlp.norm", width),
                      Linear(file, name + layer + "attention.qkv", 3 * width, width, by_head(shape), kind),
                      linear(layer + "attention.proj", width, width, kind),
                      linear(layer + "mlp.main.0", 4 * width, width, kind),
                      linear(layer + "mlp.main.2", width, 4 * width, kind)});
  }
  std::vector<Linear*> all = {&in, &out};
  for (Layer& layer : layers) all.insert(all.end(), {&layer.qkv, &layer.proj, &layer.up, &layer.down});
  std::int64_t bytes = 0;
  for (const Linear* one : all) bytes += one->bytes();
  memory_ = Buffer<std::uint8_t>(bytes);
  std::uint8_t* place = memory_.data();
  for (Linear* one : all) {
    one->pack(file, place, team);
    place += one->bytes();
  }
}

}  // namespace tarflow::native
