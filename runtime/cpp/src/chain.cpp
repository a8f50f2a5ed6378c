#include "chain.hpp"

#include <cmath>

#include "patches.hpp"

namespace tarflow::internal {

Patches Chain::decode(const Patches& z, const Branches& branches, const Watch& watch) const {
  Patches x(z.size()), next(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) x[i] = z[i] * deviation_[i % deviation_.size()];
  for (std::size_t block = size(shape.blocks); block-- > 0;) {
    opened_.backend->invert({call, block, branches}, x.data(), next.data(), [&](std::int64_t position) {
      call.check();
      if (watch.on_step) watch.on_step(block, position);
    });
    x.swap(next);
    if (watch.on_block) watch.on_block(block, x);
  }
  return x;
}

std::vector<double> Chain::encode(Patches& x, const Branches& branches) const {
  Patches z(x.size());
  std::vector<double> log_det(size(branches.batch), 0.0);
  std::vector<float> of_block(log_det.size());
  for (std::size_t block = 0; block < size(shape.blocks); ++block) {
    opened_.backend->forward({call, block, branches}, x.data(), z.data(), of_block.data());
    x.swap(z);
    for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += of_block[i];
  }
  return log_det;
}

Chain::Encoded Chain::states(const Patches& x, const Branches& branches) const {
  Encoded found{{x}, std::vector<double>(size(branches.batch), 0.0)};
  std::vector<float> of_block(found.log_det.size());
  for (std::size_t block = 0; block < size(shape.blocks); ++block) {
    Patches z(x.size());
    opened_.backend->forward({call, block, branches}, found.states.back().data(), z.data(), of_block.data());
    found.states.push_back(std::move(z));
    for (std::size_t i = 0; i < of_block.size(); ++i) found.log_det[i] += of_block[i];
  }
  return found;
}

void Chain::denoise(Patches& x, const Branches& plain, double strength, std::vector<Patches> states) const {
  if (states.empty()) states = this->states(x, plain).states;
  Patches grad = std::move(states.back());
  states.pop_back();
  for (float& value : grad) value = -value;
  for (std::size_t block = size(shape.blocks); block-- > 0; states.pop_back()) {
    opened_.backend->gradient({call, block, plain}, states.back().data(), grad.data());
  }
  const auto factor = static_cast<float>(strength * (*shape.noise_std * *shape.noise_std));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += factor * grad[i];
}

std::vector<float> Chain::round_trip(const Patches& found, const Patches& z) const {
  const std::size_t numbers = deviation_.size();
  std::vector<float> errors(found.size() / numbers, 0.0F);
  for (std::size_t row = 0; row < errors.size(); ++row) {
    for (std::size_t k = 0; k < numbers; ++k) {
      const std::size_t at = row * numbers + k;
      const float error = std::fabs(found[at] - z[at] * deviation_[k]);
      if (!(error <= errors[row])) errors[row] = error;  // NaN stays
      if (std::isnan(error)) break;
    }
  }
  return errors;
}

std::vector<double> Chain::log_prob(const Patches& latents, const std::vector<double>& log_det) const {
  const std::size_t numbers = deviation_.size();
  std::vector<double> nats(log_det);
  for (std::size_t row = 0; row < nats.size(); ++row) {
    double energy = 0;
    for (std::size_t k = 0; k < numbers; ++k) {
      const double deviation = deviation_[k], z = latents[row * numbers + k] / deviation;
      energy += 0.5 * z * z + std::log(deviation) + kHalfLogTwoPi;
    }
    nats[row] -= energy;
  }
  return nats;
}

}  // namespace tarflow::internal
