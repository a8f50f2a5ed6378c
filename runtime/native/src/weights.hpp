// The weights of one block, packed for products in a precision.
#pragma once

#include <string>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "safetensors.hpp"
#include "shape.hpp"
#include "team.hpp"

namespace tarflow::native {

// A linear map whose weights lie in panels of 64 outputs. `order` (panels * 64) says which row of the file is at which
// output, -1 none.
class Linear {
 public:
  Linear() = default;
  // Of the (N, K) weights and the (N) bias called `name`, which are still to be packed. Throws Wrong.
  Linear(const Safetensors& file, const std::string& name, std::int64_t outputs, std::int64_t inputs,
         std::vector<std::int64_t> order, Precision precision);

  std::int64_t bytes() const { return panels_.count * panels_.stride; }
  void pack(const Safetensors& file, std::uint8_t* place, Team& team);  // to where bytes() are free, a cache line's start

  const Panels& panels() const { return panels_; }

 private:
  void pack_panel(const Tensor& tensor, const std::vector<float>& columns, std::int64_t panel);
  void pack_numbers(const float* rows, std::int64_t panel);
  void pack_levels(const float* rows, const float* columns, std::int64_t panel);

  std::string name_;
  std::int64_t outputs_ = 0;
  std::vector<std::int64_t> order_;
  Panels panels_;
  std::uint8_t* weights_ = nullptr;
  Buffer<float> scales_, bias_;
};

struct Norm {
  Buffer<float> gain, bias;  // padded to whole panels
};

struct Layer {
  Norm before_attention, before_mlp;
  Linear qkv, proj, up, down;  // qkv: by head the rows of its query, key and value, padded to whole panels
};

struct Block {
  // Throws Wrong, std::bad_alloc.
  Block(const Safetensors& file, const Shape& shape, std::int64_t index, Precision precision, Team& team);

  const Precision precision;
  const bool reversed;  // reads the sequence backwards
  Linear in, out;
  Buffer<float> positions, classes;  // (T, C) in patch order and (classes + 1, C), rows padded to whole panels
  std::vector<Layer> layers;

 private:
  Buffer<std::uint8_t> memory_;  // all packed weights: in a few large pages, where one by one they would be in many small
};

}  // namespace tarflow::native
