#include "decoding.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tarflow::native {
namespace {

constexpr std::int64_t kTogether = 48;  // rows that pass a panel's weights at once: their outputs stay near

std::int64_t chunks(std::int64_t rows) { return (rows + kTogether - 1) / kTogether; }
std::int64_t in_chunk(std::int64_t chunk, std::int64_t rows) { return std::min(kTogether, rows - chunk * kTogether); }

// Numbers of keys and of values in one head's cache.
std::int64_t keys_of(const Shape& shape, std::int64_t head_dim) { return padded(shape.tokens, kLanes) * head_dim; }
std::int64_t values_of(const Shape& shape) { return padded(shape.tokens, 2) * padded(shape.head_dim, kLanes); }

// Keys and values of all heads.
std::int64_t numbers_of(const Shape& shape, std::int64_t sequences, bool as_bytes) {
  const std::int64_t keys = keys_of(shape, as_bytes ? padded(shape.head_dim, 4) : shape.head_dim);
  return product({shape.layers, sequences, shape.heads(), keys + values_of(shape)});
}

}  // namespace

Cache::Cache(const Shape& shape, std::int64_t sequences, bool as_bytes) {
  const std::int64_t count = numbers_of(shape, sequences, as_bytes);
  if (as_bytes) {
    bytes = Buffer<std::uint8_t>(count);
    scales = Buffer<float>(product({shape.layers, sequences, shape.heads(), 2, padded(shape.tokens, kGroup)}));
  } else {
    floats = Buffer<float>(count);
  }
}

bool Cache::fits(const Shape& shape, std::int64_t sequences, bool as_bytes) const {
  return (as_bytes ? bytes.count() : floats.count()) == numbers_of(shape, sequences, as_bytes);
}

Slots Cache::slots(const Shape& shape, std::int64_t head) {
  const bool as_bytes = bytes.count() > 0;
  const std::int64_t keys = keys_of(shape, as_bytes ? padded(shape.head_dim, 4) : shape.head_dim);
  const std::int64_t size = keys + values_of(shape), slots = padded(shape.tokens, kGroup);
  Slots found;
  if (as_bytes) {
    found.byte_keys = bytes + head * size;
    found.byte_values = reinterpret_cast<std::int8_t*>(bytes + head * size + keys);
    found.key_scales = scales + head * 2 * slots;
    found.value_scales = found.key_scales + slots;
  } else {
    found.keys = floats + head * size;
    found.values = found.keys + keys;
  }
  return found;
}

Held::Held(const Shape& shape, const Batch& batch, Cache kept, bool bytes)
    : images(batch.images),
      branches(batch.branches),
      z(product({batch.images, shape.tokens, shape.patch_dim})),
      x(z.count()),
      mix(2 * batch.branches * shape.tokens),
      query_scale(batch.branches),
      cache(kept.fits(shape, images * branches, bytes) ? std::move(kept) : Cache(shape, images * branches, bytes)) {
  std::copy_n(batch.z, z.count(), z.data());
  std::copy_n(batch.z, z.count(), x.data());
  std::copy_n(batch.mix, mix.count(), mix.data());
  for (std::int64_t g = 0; g < branches; ++g)
    query_scale[g] = batch.inverse_temperature[g] / std::sqrt(static_cast<float>(shape.head_dim));
  for (std::int64_t i = 0; i < branches * images; ++i) {
    const std::int64_t label = batch.labels[i];
    if (label >= shape.classes && shape.classes > 0) throw Wrong("a label is no class of the model");
    labels.push_back(label < 0 ? shape.classes : label);
  }
}

Decoding::Decoding(std::shared_ptr<const Block> block, const Shape& shape, const Kernels& kernels, Held& batch,
                   int threads)
    : block_(std::move(block)),
      shape_(shape),
      kernels_(kernels),
      batch_(batch),
      images_(batch.images),
      branches_(batch.branches),
      stride_(padded(shape.width, kPanel)),
      bytes_(block_->precision == Precision::int8),
      scratch_(static_cast<std::size_t>(threads)) {}

void Decoding::evaluate(std::int64_t position, std::int64_t window, const std::vector<std::int64_t>& images, Team& team,
                        float* found) {
  position_ = position;
  window_ = window;
  chosen_images_ = images;
  chosen_ = static_cast<std::int64_t>(images.size());
  make_room();
  embed(team);
  for (std::int64_t l = 0; l < shape_.layers; ++l) {
    const Layer& layer = block_->layers[static_cast<std::size_t>(l)];
    const auto add_to_h = [&](std::int64_t row, std::int64_t panel, float* out) {
      kernels_.add(h_ + row * stride_ + panel * kPanel, out, kPanel);
    };
    normalise(layer.before_attention, team);
    attend(l, team);
    if (bytes_) round(mixed_, stride_, team);
    multiply(layer.proj, mixed_, team, add_to_h);
    normalise(layer.before_mlp, team);
    const std::int64_t wide = layer.up.panels().count;  // panels of the hidden layer, and groups of its bytes
    multiply(layer.up, normal_, team, [&](std::int64_t row, std::int64_t panel, float* out) {
      kernels_.gelu(out, kPanel);
      const std::int64_t at = row * wide + panel;
      if (bytes_)
        kernels_.to_bytes(out, 1, hidden_levels_ + at * kGroup, hidden_scales_ + at, hidden_sums_ + at);
      else
        std::copy_n(out, kPanel, hidden_ + at * kPanel);
    });
    multiply(layer.down, hidden_, team, add_to_h);
  }
  read_out(team, found);
}

// Buffers for as many rows as there are now, and a thread's own for as long a sequence as there may be.
void Decoding::make_room() {
  if (rows() <= room_) return;
  room_ = 0;  // until all of it is there
  const std::int64_t room = rows();
  const std::int64_t hidden = padded(4 * shape_.width, kPanel), groups = stride_ / kGroup;
  patches_ = Buffer<float>(room * shape_.patch_dim);
  h_ = Buffer<float>(room * stride_);
  normal_ = Buffer<float>(room * stride_);
  mixed_ = Buffer<float>(room * stride_);
  out_ = Buffer<float>(room * padded(shape_.outputs(), kPanel));
  if (bytes_) {
    levels_ = Buffer<std::int8_t>(room * stride_);
    level_scales_ = Buffer<float>(room * groups);
    level_sums_ = Buffer<std::int32_t>(room * groups);
    hidden_levels_ = Buffer<std::int8_t>(room * hidden);
    hidden_scales_ = Buffer<float>(room * hidden / kGroup);
    hidden_sums_ = Buffer<std::int32_t>(room * hidden / kGroup);
  } else {
    hidden_ = Buffer<float>(room * hidden);
  }
  const std::int64_t head = padded(shape_.head_dim, kLanes);
  for (Scratch& scratch : scratch_) {
    scratch.outputs = Buffer<float>(kTogether * padded(3 * shape_.head_dim, kPanel) + kPanel);
    scratch.scores = Buffer<float>(padded(shape_.tokens, kGroup) + head + kGroup);
    scratch.head = Buffer<float>(head);
    scratch.queries = Buffer<float>(room * head);
  }
  room_ = room;
}

// What a product with one row costs, times the rows.
double Decoding::cost(std::int64_t inputs, std::int64_t outputs) const {
  return static_cast<double>(rows()) * static_cast<double>(inputs) * static_cast<double>(outputs);
}

// h = proj_in(x) + position + class. Images' patches are multiplied once, for all branches.
void Decoding::embed(Team& team) {
  const std::int64_t patch_dim = shape_.patch_dim, patches = chosen_ * window_;
  for (std::int64_t i = 0; i < chosen_; ++i)
    std::copy_n(batch_.x + (chosen_images_[static_cast<std::size_t>(i)] * shape_.tokens + position_) * patch_dim,
                window_ * patch_dim, patches_ + i * window_ * patch_dim);
  const Panels& panels = block_->in.panels();
  const auto work = [&](std::int64_t unit, int thread) {
    const std::int64_t panel = unit % panels.count, first = unit / panels.count * kTogether;
    const std::int64_t count = std::min(kTogether, patches - first);
    float* out = scratch_[static_cast<std::size_t>(thread)].outputs.data();
    const Rows rows = {count, patches_ + first * patch_dim, patch_dim, nullptr, nullptr, nullptr};
    kernels_.multiply(panels, panel, rows, out);
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t image = chosen_images_[static_cast<std::size_t>((first + r) / window_)];
      const std::int64_t i = position_ + (first + r) % window_, at = block_->reversed ? shape_.tokens - 1 - i : i;
      kernels_.add(out + r * kPanel, block_->positions + at * stride_ + panel * kPanel, kPanel);
      for (std::int64_t g = 0; g < branches_; ++g) {
        float* h = h_ + (g * patches + first + r) * stride_ + panel * kPanel;
        std::copy_n(out + r * kPanel, kPanel, h);
        if (shape_.classes == 0) continue;
        const std::int64_t label = batch_.labels[static_cast<std::size_t>(g * images_ + image)];
        kernels_.add(h, block_->classes + label * stride_ + panel * kPanel, kPanel);
      }
    }
  };
  team.run(panels.count * chunks(patches), cost(patch_dim, shape_.width), work);
}

void Decoding::normalise(const Norm& norm, Team& team) {
  const std::int64_t groups = stride_ / kGroup;
  const auto work = [&](std::int64_t chunk, int) {
    for (std::int64_t row = chunk * 4; row < std::min(rows(), chunk * 4 + 4); ++row) {
      kernels_.normalise(h_ + row * stride_, norm.gain.data(), norm.bias.data(), shape_.width, normal_ + row * stride_);
      if (bytes_)
        kernels_.to_bytes(normal_ + row * stride_, groups, levels_ + row * stride_, level_scales_ + row * groups,
                          level_sums_ + row * groups);
    }
  };
  team.run((rows() + 3) / 4, cost(16, shape_.width), work);
}

// The bytes that int8 products take, of rows of floats.
void Decoding::round(const Buffer<float>& x, std::int64_t width, Team& team) {
  const std::int64_t groups = width / kGroup;
  const auto work = [&](std::int64_t chunk, int) {
    for (std::int64_t row = chunk * 4; row < std::min(rows(), chunk * 4 + 4); ++row)
      kernels_.to_bytes(x + row * width, groups, levels_ + row * width, level_scales_ + row * groups,
                        level_sums_ + row * groups);
  };
  team.run((rows() + 3) / 4, cost(8, width), work);
}

// Each unit is one head of some sequences: query, key and value of all their rows, then attention.
void Decoding::attend(std::int64_t layer, Team& team) {
  const std::int64_t heads = shape_.heads(), threads = team.threads();
  const std::int64_t wanted = std::max<std::int64_t>((4 * threads + heads - 1) / heads, 1);
  const std::int64_t most = std::max<std::int64_t>(rows() / 12, 1);  // a tile or two of rows in each
  const std::int64_t parts = std::min({sequences(), wanted, most});
  const auto work = [&](std::int64_t unit, int thread) {
    const std::int64_t part = unit / heads, first = sequences() * part / parts;
    const std::int64_t count = sequences() * (part + 1) / parts - first;
    attend_head(layer, unit % heads, first, count, scratch_[static_cast<std::size_t>(thread)]);
  };
  team.run(heads * parts, cost(3 * shape_.width + 2 * (position_ + window_), shape_.width), work);
}

void Decoding::attend_head(std::int64_t layer, std::int64_t head, std::int64_t first, std::int64_t count,
                           Scratch& scratch) {
  const Linear& qkv = block_->layers[static_cast<std::size_t>(layer)].qkv;
  const std::int64_t d = shape_.head_dim, stride = padded(d, kLanes), panels = padded(3 * d, kPanel) / kPanel;
  const std::int64_t start = first * window_, rows = count * window_;
  for (std::int64_t chunk = 0; chunk < chunks(rows); ++chunk) {
    const std::int64_t begin = chunk * kTogether, some = in_chunk(chunk, rows);
    const Rows in = inputs_of(qkv, normal_, start + begin, some);
    for (std::int64_t panel = 0; panel < panels; ++panel)
      kernels_.multiply(qkv.panels(), head * panels + panel, in, scratch.outputs + panel * kTogether * kPanel);
    const auto take = [&](std::int64_t r, std::int64_t n, float* to) {  // d numbers from the n-th of query, key and value
      for (std::int64_t i = 0, run; i < d; i += run, n += run) {
        run = std::min(d - i, kPanel - n % kPanel);
        std::copy_n(scratch.outputs + (n / kPanel * kTogether + r) * kPanel + n % kPanel, run, to + i);
      }
    };
    for (std::int64_t r = 0; r < some; ++r) {
      const std::int64_t row = start + begin + r, sequence = row / window_;
      const std::int64_t branch = sequence / chosen_, image = chosen_images_[static_cast<std::size_t>(sequence % chosen_)];
      float *query = scratch.queries + (begin + r) * stride, *key = scratch.head.data(), *value = scratch.scores.data();
      std::fill(value, value + stride, 0.0f);
      take(r, 0, query);
      take(r, d, key);
      take(r, 2 * d, value);
      for (std::int64_t i = 0; i < d; ++i) query[i] *= batch_.query_scale[branch];
      kernels_.keep(slots(layer, branch * images_ + image, head), position_ + row % window_, d, key, value);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = start + r, sequence = row / window_;
    const std::int64_t branch = sequence / chosen_, image = chosen_images_[static_cast<std::size_t>(sequence % chosen_)];
    kernels_.attend(slots(layer, branch * images_ + image, head), position_ + row % window_ + 1, d,
                    scratch.queries + r * stride, scratch.head.data(), scratch.scores.data());
    std::copy_n(scratch.head.data(), d, mixed_ + row * stride_ + head * d);
    std::fill_n(scratch.head.data(), stride, 0.0f);
  }
}

Slots Decoding::slots(std::int64_t layer, std::int64_t sequence, std::int64_t head) {
  return batch_.cache.slots(shape_, (layer * images_ * branches_ + sequence) * shape_.heads() + head);
}

// Rows of what a product multiplies: floats, or the bytes that were made of them.
Rows Decoding::inputs_of(const Linear& linear, const Buffer<float>& x, std::int64_t first, std::int64_t count) const {
  const std::int64_t stride = padded(linear.panels().inputs, kPanel), groups = stride / kGroup;
  if (linear.panels().precision != Precision::int8) return {count, x + first * stride, stride, nullptr, nullptr, nullptr};
  const bool hidden = &x == &hidden_;
  return {count,
          nullptr,
          stride,
          (hidden ? hidden_levels_ : levels_) + first * stride,
          (hidden ? hidden_scales_ : level_scales_) + first * groups,
          (hidden ? hidden_sums_ : level_sums_) + first * groups};
}

// A product of all rows; then(row, panel, out) with 64 outputs of one row each.
template <class Then>
void Decoding::multiply(const Linear& linear, const Buffer<float>& x, Team& team, const Then& then) {
  const Panels& panels = linear.panels();
  const auto work = [&](std::int64_t unit, int thread) {
    const std::int64_t chunk = unit / panels.count, panel = unit % panels.count, first = chunk * kTogether;
    Scratch& scratch = scratch_[static_cast<std::size_t>(thread)];
    const Rows in = inputs_of(linear, x, first, in_chunk(chunk, rows()));
    kernels_.multiply(panels, panel, in, scratch.outputs.data());
    for (std::int64_t r = 0; r < in.count; ++r) then(first + r, panel, scratch.outputs + r * kPanel);
  };
  team.run(panels.count * chunks(rows()), cost(panels.inputs, panels.count * kPanel), work);
}

void Decoding::read_out(Team& team, float* found) {
  const std::int64_t outputs = padded(shape_.outputs(), kPanel), patch_dim = shape_.patch_dim;
  multiply(block_->out, h_, team, [&](std::int64_t row, std::int64_t panel, const float* out) {
    std::copy_n(out, kPanel, out_ + row * outputs + panel * kPanel);
  });
  const std::int64_t patches = chosen_ * window_;
  for (std::int64_t i = 0; i < patches; ++i) {
    const std::int64_t image = chosen_images_[static_cast<std::size_t>(i / window_)], at = position_ + i % window_;
    const Outputs all = {out_ + i * outputs, branches_, patches * outputs, batch_.mix + at, shape_.tokens, shape_.nvp};
    kernels_.affine(all, patch_dim, batch_.z + (image * shape_.tokens + at + 1) * patch_dim, found + i * patch_dim);
  }
}

}  // namespace tarflow::native
