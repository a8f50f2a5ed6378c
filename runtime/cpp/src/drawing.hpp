// A request on its way to images: tile by tile decoded, drawn again where it overflowed, certified, denoised.
#pragma once

#include <vector>

#include "chain.hpp"
#include "request.hpp"

namespace tarflow::internal {

class Drawing {
 public:
  // `images` (n, channels, size, size) is written a tile at a time.
  Drawing(const Chain& chain, const Request& request, float* images);

  void draw();

  // Of each sample the round-trip error, and the log-density in nats of the raw sample; empty unless the request asks for
  // a certificate.
  std::vector<float> certificate;
  std::vector<double> log_prob;

 private:
  struct Tile;

  void draw(const Tile& tile);
  void redraw(const Tile& tile, Patches& z, const Branches& branches, Patches& x) const;
  void fill(const Tile& tile, Patches& z) const;
  Watch watch(const Tile& tile);
  void show(const Tile& tile, std::size_t block, const Patches& x) const;

  const Chain& chain_;
  const Request& request_;
  const ModelShape& shape_;
  float* const images_;
  std::int64_t done_ = 0, total_ = 0;  // sequential steps
};

}  // namespace tarflow::internal
