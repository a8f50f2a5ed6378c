// One block being inverted for one batch: x[i + 1] = z[i + 1] exp(log_scale_i) + shift_i, log_scale_i and shift_i what the
// block's transformer makes of x[0 ... i] (arXiv 2412.06329, section 3).
//
// Shapes: B images, G guidance branches, T patches of D numbers, W positions of a window, C width, H heads, d head
// dimension. A sequence is one branch of one image; a row is one position of one sequence, sequences first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "shape.hpp"
#include "team.hpp"
#include "weights.hpp"

namespace tarflow::native {

// What is decoded: B images' latents in block order, (B, T, D); labels (G, B), below 0 for the null class; mix (2, G, T);
// inverse temperatures (G).
struct Batch {
  std::int64_t images = 0, branches = 0;
  const float* z = nullptr;
  const std::int64_t* labels = nullptr;
  const float* mix = nullptr;
  const float* inverse_temperature = nullptr;
};

// The keys and values of a batch, as floats or as bytes with a scale for each slot. What is in it at first means nothing.
struct Cache {
  Cache() = default;
  Cache(const Shape& shape, std::int64_t sequences, bool bytes);

  bool fits(const Shape& shape, std::int64_t sequences, bool bytes) const;
  Slots slots(const Shape& shape, std::int64_t head);

  Buffer<float> floats, scales;
  Buffer<std::uint8_t> bytes;
};

// A batch while it is decoded: a copy of what was given, and what is found. `cache` is one that fits, or empty. Throws
// Wrong for a label that is no class, std::bad_alloc.
struct Held {
  Held(const Shape& shape, const Batch& batch, Cache cache, bool bytes);

  const std::int64_t images, branches;
  Buffer<float> z, x, mix, query_scale;  // x: the patches found so far, (B, T, D) in block order, at first z
  std::vector<std::int64_t> labels;      // (G, B), classes for the null class
  Cache cache;
};

// Who decodes: all of a batch, or some images of it while others decode the rest.
class Decoding {
 public:
  // Refers to the batch.
  Decoding(std::shared_ptr<const Block> block, const Shape& shape, const Kernels& kernels, Held& batch, int threads);

  // From the patches at position ... position + window - 1 of some images, in growing order, the next ones: (n, W, D) in
  // `found`, n the images chosen. Keys and values are kept. The caller has checked the bounds.
  void evaluate(std::int64_t position, std::int64_t window, const std::vector<std::int64_t>& images, Team& team,
                float* found);

 private:
  struct Scratch {  // of one thread
    Buffer<float> outputs, scores, head, queries;
  };

  std::int64_t sequences() const { return chosen_ * branches_; }
  std::int64_t rows() const { return sequences() * window_; }
  double cost(std::int64_t inputs, std::int64_t outputs) const;
  Slots slots(std::int64_t layer, std::int64_t sequence, std::int64_t head);
  Rows inputs_of(const Linear& linear, const Buffer<float>& x, std::int64_t first, std::int64_t count) const;

  void make_room();
  void embed(Team& team);
  void normalise(const Norm& norm, Team& team);
  void round(const Buffer<float>& x, std::int64_t width, Team& team);
  void attend(std::int64_t layer, Team& team);
  void attend_head(std::int64_t layer, std::int64_t head, std::int64_t first, std::int64_t count, Scratch& scratch);
  template <class Then>
  void multiply(const Linear& linear, const Buffer<float>& x, Team& team, const Then& then);
  void read_out(Team& team, float* found);

  const std::shared_ptr<const Block> block_;
  const Shape shape_;
  const Kernels& kernels_;
  Held& batch_;
  const std::int64_t images_, branches_, stride_;  // stride_: C padded to whole panels
  const bool bytes_;                               // products and cache of int8
  std::vector<Scratch> scratch_;

  // Of the call in progress.
  std::int64_t position_ = 0, window_ = 0, chosen_ = 0, room_ = 0;
  std::vector<std::int64_t> chosen_images_;
  Buffer<float> patches_, h_, normal_, mixed_, hidden_, out_;  // by row: D, C, C, C, 4 C, outputs
  Buffer<std::int8_t> levels_, hidden_levels_;                 // of normal_ or mixed_, and of hidden_
  Buffer<float> level_scales_, hidden_scales_;
  Buffer<std::int32_t> level_sums_, hidden_sums_;
};

}  // namespace tarflow::native
