#include "flow.hpp"

#include <algorithm>

#include "drawing.hpp"
#include "error.hpp"
#include "noise.hpp"
#include "patches.hpp"

namespace tarflow::internal {

Flow::Flow(std::shared_ptr<const Opened> opened)
    : opened(std::move(opened)), shape_(model().shape), chain_(*this->opened, call) {
  this->opened->backend->prepare(call);
}

void Flow::sample(const Request& request, float* images) {
  Drawing drawing(chain_, request, images);
  drawing.draw();
  for (std::int64_t row = 0; row < request.n; ++row) note(row, images + row * shape_.numbers(), shape_.numbers());
  warn_of_nonfinite(request);
  certificate = std::move(drawing.certificate);  // of a call that ended well
  log_prob = std::move(drawing.log_prob);
}

void Flow::note(std::int64_t row, const float* numbers, std::int64_t count) {
  if (!finite(numbers, count) && (nonfinite.empty() || nonfinite.back() != row)) nonfinite.push_back(row);
}

void Flow::warn_of_nonfinite(const Request& request) const {
  if (nonfinite.empty()) return;
  const std::size_t broken = nonfinite.size();
  std::string indices;
  for (std::size_t i = 0; i < std::min<std::size_t>(broken, 8); ++i) {
    indices += (i > 0 ? ", " : "") + text_of(request.first_sample + static_cast<std::uint64_t>(nonfinite[i]));
  }
  opened->say(TARFLOW_LOG_WARNING, text_of(broken) + " of " + text_of(request.n) + " samples are not finite (" +
                                       indices + (broken > 8 ? ", ..." : "") +
                                       "): weaker guidance, or redraw_nonfinite, avoids that");
}

void Flow::encode(const Images& images, float* latents, float* log_det) {
  in_batches(images, [&](std::int64_t start, Patches& x, const Branches& plain) {
    const std::vector<double> nats = chain_.encode(x, plain);
    if (latents != nullptr) std::copy(x.begin(), x.end(), latents + start * shape_.numbers());
    for (std::int64_t i = 0; i < plain.batch; ++i) {
      note(start + i, x.data() + i * shape_.numbers(), shape_.numbers());
      const float rounded = static_cast<float>(nats[size(i)]);
      note(start + i, &rounded, 1);
      if (log_det != nullptr) log_det[start + i] = rounded / static_cast<float>(shape_.numbers());
    }
  });
}

void Flow::log_likelihood(const Images& images, float* nats) {
  const std::int64_t numbers = shape_.numbers();
  in_batches(images, [&](std::int64_t start, Patches& x, const Branches& plain) {
    const std::vector<double> log_det = chain_.encode(x, plain);
    for (std::int64_t i = 0; i < plain.batch; ++i) {
      double energy = 0;
      for (std::int64_t k = 0; k < numbers; ++k) {
        const double latent = x[size(i * numbers + k)];
        energy += 0.5 * latent * latent + kHalfLogTwoPi;
      }
      nats[start + i] = static_cast<float>(log_det[size(i)] - energy);
      note(start + i, nats + start + i, 1);
    }
  });
}

void Flow::denoise(const Images& images, double strength, float* denoised) {
  const double checked = checked_strength(shape_, strength, "strength");
  in_batches(images, [&](std::int64_t start, Patches& x, const Branches& plain) {
    chain_.denoise(x, plain, checked, {});
    unpatchify(shape_, plain.batch, x.data(), denoised + start * shape_.numbers());
    for (std::int64_t i = 0; i < plain.batch; ++i) note(start + i, x.data() + i * shape_.numbers(), shape_.numbers());
  });
}

void Flow::noise(std::uint64_t seed, std::uint64_t first, std::int64_t n, float* noise) {
  checked_count(shape_, n, first);
  for (std::int64_t i = 0; i < n; ++i) {
    call.check();
    normal(seed, first + static_cast<std::uint64_t>(i), kSampling, size(shape_.numbers()),
           noise + i * shape_.numbers());
  }
}

// Calls work(start, patches, branches) for batches of images.
template <class Work>
void Flow::in_batches(const Images& images, const Work& work) const {
  const std::int64_t batch = default_batch(model(), 1);
  for (std::int64_t start = 0; start < images.n; start += batch) {
    const std::int64_t rows = std::min(batch, images.n - start);
    Patches x(size(rows * shape_.numbers()));
    patchify(shape_, rows, images.pixels + start * shape_.numbers(), x.data());
    const auto first = images.classes.begin() + start;
    work(start, x, plain(shape_, {first, first + rows}));
  }
}

}  // namespace tarflow::internal
