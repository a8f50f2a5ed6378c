// The blocks of a flow, one behind the other: decoded last to first, encoded first to last, and the gradient back.
// Shapes: B images, T patches, D numbers in a patch; everything in patch order.
#pragma once

#include <functional>
#include <vector>

#include "opened.hpp"

namespace tarflow::internal {

using Patches = std::vector<float>;  // (B, T, D)

constexpr double kHalfLogTwoPi = 0.91893853320467274178;

// Who is told of decoding; either throws to end it.
struct Watch {
  std::function<void(std::size_t block, std::int64_t position)> on_step;
  std::function<void(std::size_t block, const Patches& x)> on_block;
};

// Every block of an open bundle, for one handle's calls.
class Chain {
 public:
  // x itself, what is between blocks, and behind the last the latents; log-determinants (B) in nats.
  struct Encoded {
    std::vector<Patches> states;
    std::vector<double> log_det;
  };

  Chain(const Opened& opened, Call& call)
      : call(call), shape(opened.bundle.manifest.shape), opened_(opened), deviation_(opened.bundle.deviation) {}

  // Noise -> raw samples.
  Patches decode(const Patches& z, const Branches& branches, const Watch& watch) const;

  // Patches -> latents, in place, and log-determinants (B) in nats.
  std::vector<double> encode(Patches& x, const Branches& branches) const;

  // The same, with all states kept.
  Encoded states(const Patches& x, const Branches& branches) const;

  // x + strength * sigma^2 * grad log p(x), walked back through the blocks (Tweedie) from the `states` of x unguided,
  // which are used up; computed here if there are none.
  void denoise(Patches& x, const Branches& plain, double strength, std::vector<Patches> states) const;

  // (B): the largest difference of encoded samples from the noise they were decoded from.
  std::vector<float> round_trip(const Patches& found, const Patches& z) const;

  // (B): the log-density in nats of samples that encode to this, under the noise that decoding begins with. Guided too:
  // what guidance changes of a patch is a function of earlier ones, so the Jacobian is triangular.
  std::vector<double> log_prob(const Patches& latents, const std::vector<double>& log_det) const;

  Call& call;
  const ModelShape& shape;

 private:
  const Opened& opened_;
  const std::vector<float>& deviation_;
};

}  // namespace tarflow::internal
