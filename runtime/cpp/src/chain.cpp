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

std::vector<float> Chain::encode(Patches& x, const Branches& branches) const {
  Patches z(x.size());
  std::vector<float> log_det(size(branches.batch), 0.0F), of_block(log_det.size());
  for (std::size_t block = 0; block < size(shape.blocks); ++block) {
    opened_.backend->forward({call, block, branches}, x.data(), z.data(), of_block.data());
    x.swap(z);
    for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += of_block[i];
  }
  return log_det;
}

std::vector<Patches> Chain::states(const Patches& x, const Branches& branches) const {
  std::vector<Patches> states{x};
  std::vector<float> log_det(size(branches.batch));
  for (std::size_t block = 0; block < size(shape.blocks); ++block) {
    Patches z(x.size());
    opened_.backend->forward({call, block, branches}, states.back().data(), z.data(), log_det.data());
    states.push_back(std::move(z));
  }
  return states;
}

void Chain::denoise(Patches& x, const Branches& plain, double strength, std::vector<Patches> states) const {
  if (states.empty()) states = this->states(x, plain);
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

}  // namespace tarflow::internal
