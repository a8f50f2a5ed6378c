// The numbers of a model that a block is decoded with.
#pragma once

#include <cstdint>

#include "safetensors.hpp"

namespace tarflow::native {

// T patches of D numbers, width C in heads of d, K classes (0: none); without `nvp` there are shifts alone.
struct Shape {
  std::int64_t tokens = 0, patch_dim = 0, width = 0, head_dim = 0, layers = 0, blocks = 0, classes = 0;
  bool nvp = true;

  std::int64_t heads() const { return width / head_dim; }
  std::int64_t outputs() const { return nvp ? 2 * patch_dim : patch_dim; }

  // Throws Wrong for what is no model, or one too large to multiply its sizes.
  void check() const {
    constexpr std::int64_t kMost = std::int64_t{1} << 20;
    for (const std::int64_t size : {tokens, patch_dim, width, head_dim, layers, blocks})
      if (size < 1 || size > kMost) throw Wrong("a size of the model is not in 1 ... 1,048,576");
    if (classes < 0 || classes > kMost) throw Wrong("the number of classes is not in 0 ... 1,048,576");
    if (head_dim > 1 << 16) throw Wrong("the head dimension is above 65,536: products of its bytes would not fit 32 bits");
    if (width % head_dim != 0) throw Wrong("the head dimension does not divide the width");
  }
};

}  // namespace tarflow::native
