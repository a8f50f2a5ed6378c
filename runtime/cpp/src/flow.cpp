#include "flow.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "noise.hpp"
#include "patches.hpp"
#include "run.hpp"

namespace tarflow::internal {
namespace {

constexpr std::uint32_t kRedraws = 8;
constexpr double kCacheBudget = 0x1p31;  // bytes of KV cache a default batch may take
constexpr std::int64_t kLargestBatch = 64;

}  // namespace

Flow::Flow(std::shared_ptr<Opened> opened) : opened(std::move(opened)), shape_(this->opened->bundle.manifest.shape) {
  this->opened->backend->prepare(call);
}

void Flow::sample(std::int64_t n, const float* noise, const std::int64_t* labels, const tarflow_sample_options& options,
                  float* images) {
  certificate.clear();
  Run run = plan(n, noise, labels, options);
  if (options.certify != 0) run.certificate.resize(size(n));
  const auto tile = static_cast<std::uint64_t>(run.tile);
  const std::uint64_t first = options.first_sample;
  std::uint64_t start = options.reproducible != 0 ? first / tile * tile : first;
  for (;;) {
    const std::uint64_t left = first + static_cast<std::uint64_t>(n - 1) - start;  // at most 2^64 - 1: no overflow
    draw(run, start, options.reproducible != 0 || left >= tile ? run.tile : static_cast<std::int64_t>(left + 1),
         images);
    if (left < tile) break;
    start += tile;
  }
  warn_of_nonfinite(run, images);
  certificate = std::move(run.certificate);  // of a run that ended well
}

void Flow::warn_of_nonfinite(const Run& run, const float* images) const {
  std::string indices;
  std::int64_t broken = 0;
  for (std::int64_t row = 0; row < run.n; ++row) {
    if (finite(images + row * shape_.numbers(), shape_.numbers())) continue;
    const std::uint64_t index = run.options.first_sample + static_cast<std::uint64_t>(row);
    if (broken++ < 8) indices += (broken > 1 ? ", " : "") + std::to_string(index);
  }
  if (broken == 0) return;
  opened->say(TARFLOW_LOG_WARNING, std::to_string(broken) + " of " + std::to_string(run.n) +
                                       " samples are not finite (" + indices + (broken > 8 ? ", ..." : "") +
                                       "): weaker guidance, or redraw_nonfinite, avoids that");
}

void Flow::draw(Run& run, std::uint64_t start, std::int64_t rows, float* images) {
  const std::uint64_t first = run.options.first_sample;
  Tile tile{start, rows, 0, 0, 0};
  if (start < first) tile.before = static_cast<std::int64_t>(first - start);
  if (start > first) tile.output = static_cast<std::int64_t>(start - first);
  tile.inside = std::min(rows - tile.before, run.n - tile.output);
  const std::int64_t numbers = shape_.numbers();
  std::vector<float> z(size(rows * numbers), 0.0F), x;
  std::vector<std::int64_t> labels(size(rows), shape_.classes);
  std::copy_n(run.labels.begin() + tile.output, tile.inside, labels.begin() + tile.before);
  float* wanted = z.data() + tile.before * numbers;
  if (run.noise != nullptr) {
    std::copy_n(run.noise + tile.output * numbers, tile.inside * numbers, wanted);
  } else {
    noise(run.options.seed, first + static_cast<std::uint64_t>(tile.output), tile.inside, wanted);
  }
  const Branches guided = branches(&run.options, labels);
  decode(run, &tile, z, guided, x);
  if (run.options.redraw_nonfinite != 0) redraw(run, tile, z, guided, x);
  States states;
  if (run.options.certify != 0) {
    std::vector<float> errors(size(rows));
    states = encode_states(x, guided);
    round_trip(states.back(), z, errors.data());
    std::copy_n(errors.begin() + tile.before, tile.inside, run.certificate.begin() + tile.output);
  }
  if (run.strength >= 0) {  // an unguided certificate has encoded what the gradient starts from
    if (run.options.guidance != 0) states.clear();
    denoise_patches(x, branches(nullptr, labels), run.strength, std::move(states));
  }
  unpatchify(shape_, tile.inside, x.data() + tile.before * numbers, images + tile.output * numbers);
}

// `tile` null: nobody watches.
void Flow::decode(Run& run, const Tile* tile, const std::vector<float>& z, const Branches& branches,
                  std::vector<float>& x) {
  const std::int64_t numbers = shape_.numbers();
  const tarflow_sample_options& options = run.options;
  x.resize(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) x[i] = z[i] * opened->bundle.deviation[i % size(numbers)];
  std::vector<float> next(x.size()), images;
  for (std::size_t block = size(shape_.blocks); block-- > 0;) {
    const auto on_step = [&](std::int64_t position) {
      if (call.cancelled()) throw Cancelled();
      if (tile == nullptr || options.progress == nullptr) return;
      const int step = static_cast<int>(position);
      if (options.progress(options.user, ++run.done, run.total, static_cast<int>(block), step) != 0) throw Cancelled();
    };
    opened->backend->invert(call, block, x.data(), branches, next.data(), on_step);
    x.swap(next);
    if (tile == nullptr || options.preview == nullptr) continue;
    images.resize(size(tile->inside * numbers));
    unpatchify(shape_, tile->inside, x.data() + tile->before * numbers, images.data());
    const std::uint64_t first = options.first_sample + static_cast<std::uint64_t>(tile->output);
    if (options.preview(options.user, static_cast<int>(block), first, tile->inside, images.data()) != 0) {
      throw Cancelled();
    }
  }
}

// Replaces samples that are not finite by later attempts of the same sample; the tile keeps its shape.
void Flow::redraw(Run& run, const Tile& tile, std::vector<float>& z, const Branches& branches, std::vector<float>& x) {
  const std::int64_t numbers = shape_.numbers();
  for (std::uint32_t attempt = 1; attempt <= kRedraws; ++attempt) {
    std::vector<std::int64_t> broken;
    for (std::int64_t row = tile.before; row < tile.before + tile.inside; ++row) {
      if (!finite(x.data() + row * numbers, numbers)) broken.push_back(row);
    }
    if (broken.empty()) return;
    for (const std::int64_t row : broken) {
      normal(run.options.seed, tile.start + static_cast<std::uint64_t>(row), attempt, size(numbers),
             z.data() + row * numbers);
    }
    std::vector<float> again;
    decode(run, nullptr, z, branches, again);
    for (const std::int64_t row : broken) std::copy_n(again.data() + row * numbers, numbers, x.data() + row * numbers);
  }
}

void Flow::encode(std::int64_t n, const float* images, const std::int64_t* labels, float* latents, float* log_det) {
  in_batches(n, images, labels, [&](std::int64_t start, std::vector<float>& x, const Branches& plain) {
    std::vector<float> sum;
    encode_patches(x, plain, sum);
    if (latents != nullptr) std::copy(x.begin(), x.end(), latents + start * shape_.numbers());
    for (std::int64_t i = 0; log_det != nullptr && i < plain.batch; ++i) {
      log_det[start + i] = sum[size(i)] / static_cast<float>(shape_.numbers());
    }
  });
}

void Flow::log_likelihood(std::int64_t n, const float* images, const std::int64_t* labels, float* nats) {
  const std::int64_t numbers = shape_.numbers();
  in_batches(n, images, labels, [&](std::int64_t start, std::vector<float>& x, const Branches& plain) {
    std::vector<float> log_det;
    encode_patches(x, plain, log_det);
    const double half_log_two_pi = 0.91893853320467274178;
    for (std::int64_t i = 0; i < plain.batch; ++i) {
      double energy = 0;
      for (std::int64_t k = 0; k < numbers; ++k) {
        const double latent = x[size(i * numbers + k)];
        energy += 0.5 * latent * latent + half_log_two_pi;
      }
      nats[start + i] = static_cast<float>(log_det[size(i)] - energy);
    }
  });
}

void Flow::denoise(std::int64_t n, const float* images, const std::int64_t* labels, double strength, float* denoised) {
  const double checked = checked_strength(strength);
  in_batches(n, images, labels, [&](std::int64_t start, std::vector<float>& x, const Branches& plain) {
    denoise_patches(x, plain, checked, {});
    unpatchify(shape_, plain.batch, x.data(), denoised + start * shape_.numbers());
  });
}

void Flow::noise(std::uint64_t seed, std::uint64_t first, std::int64_t n, float* noise) const {
  if (n < 1) throw input_error("n is " + std::to_string(n) + "; expected 1 or more samples");
  if (static_cast<std::uint64_t>(n - 1) > UINT64_MAX - first) throw input_error("sample indices end at 2^64 - 1");
  for (std::int64_t i = 0; i < n; ++i) {
    if (call.cancelled()) throw Cancelled();
    normal(seed, first + static_cast<std::uint64_t>(i), kSampling, size(shape_.numbers()),
           noise + i * shape_.numbers());
  }
}

// --- one batch, patches in and patches out ---------------------------------------------------------------------------

// Calls work(start, patches, branches) for batches of images, checked.
template <class Work>
void Flow::in_batches(std::int64_t n, const float* images, const std::int64_t* labels, const Work& work) {
  if (n < 1) throw input_error("n is " + std::to_string(n) + "; expected 1 or more images");
  check_images(n, images);
  const std::vector<std::int64_t> all = classes(n, labels);
  const std::int64_t batch = default_batch(false);
  for (std::int64_t start = 0; start < n; start += batch) {
    const std::int64_t rows = std::min(batch, n - start);
    std::vector<float> x(size(rows * shape_.numbers()));
    patchify(shape_, rows, images + start * shape_.numbers(), x.data());
    work(start, x, branches(nullptr, {all.begin() + start, all.begin() + start + rows}));
  }
}

void Flow::encode_patches(std::vector<float>& x, const Branches& branches, std::vector<float>& log_det) {
  log_det.assign(size(branches.batch), 0.0F);
  std::vector<float> z(x.size()), block_log_det(log_det.size());
  for (std::size_t block = 0; block < size(shape_.blocks); ++block) {
    opened->backend->forward(call, block, x.data(), branches, z.data(), block_log_det.data());
    x.swap(z);
    for (std::size_t i = 0; i < log_det.size(); ++i) log_det[i] += block_log_det[i];
  }
}

// x itself, what is between blocks, and behind the last the latents.
Flow::States Flow::encode_states(const std::vector<float>& x, const Branches& branches) {
  States states{x};
  std::vector<float> log_det(size(branches.batch));
  for (std::size_t block = 0; block < size(shape_.blocks); ++block) {
    std::vector<float> z(x.size());
    opened->backend->forward(call, block, states.back().data(), branches, z.data(), log_det.data());
    states.push_back(std::move(z));
  }
  return states;
}

// Walks the gradient of log p back through the blocks (Tweedie), from the `states` of x unguided, if they are known.
void Flow::denoise_patches(std::vector<float>& x, const Branches& plain, double strength, States states) {
  if (states.empty()) states = encode_states(x, plain);
  std::vector<float> grad = std::move(states.back());
  states.pop_back();
  for (float& value : grad) value = -value;
  for (std::size_t block = size(shape_.blocks); block-- > 0; states.pop_back()) {
    opened->backend->gradient(call, block, states.back().data(), plain, grad.data());
  }
  const auto factor = static_cast<float>(strength * (*shape_.noise_std * *shape_.noise_std));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += factor * grad[i];
}

// Of each row: the largest difference of `found`, an encoded sample, from the latents it was decoded from.
void Flow::round_trip(const std::vector<float>& found, const std::vector<float>& z, float* errors) const {
  const std::size_t numbers = size(shape_.numbers());
  for (std::size_t at = 0; at < found.size(); at += numbers, ++errors) {
    *errors = 0;
    for (std::size_t k = 0; k < numbers; ++k) {
      const float error = std::fabs(found[at + k] - z[at + k] * opened->bundle.deviation[k]);
      if (!(error <= *errors)) *errors = error;  // NaN stays
      if (std::isnan(error)) break;
    }
  }
}

// `guidance` null or of scale 0: one branch.
Branches Flow::branches(const tarflow_sample_options* guidance, std::vector<std::int64_t> labels) const {
  const auto batch = static_cast<std::int64_t>(labels.size()), tokens = shape_.tokens();
  if (guidance == nullptr || guidance->guidance == 0) {
    return {batch, 1, std::move(labels), std::vector<float>(size(2 * tokens), 1.0F), {1.0F}};
  }
  Branches found{batch, 2, std::move(labels), {}, {1.0F, static_cast<float>(1 / guidance->attention_temperature)}};
  found.labels.resize(size(2 * batch), shape_.classes);
  for (const char part : {'a', 'b'}) {
    const bool chosen = std::strchr(guidance->guided, part) != nullptr;
    for (const double sign : {1.0, -1.0}) {  // conditional 1 + s, unconditional -s
      for (std::int64_t i = 0; i < tokens; ++i) {
        const double ramp =
            guidance->annealed != 0 ? double(i + 1) / double(std::max<std::int64_t>(tokens - 1, 1)) : 1.0;
        const double scale = chosen ? guidance->guidance * ramp : 0.0;
        found.mix.push_back(static_cast<float>(sign > 0 ? 1 + scale : -scale));
      }
    }
  }
  return found;
}

// Bytes of keys and values that one image takes.
double Flow::cache_row(bool guided) const {
  const std::string& precision = opened->bundle.manifest.precision;
  const double item = precision == "fp16" || precision == "bf16" ? 2 : 4;
  return 2.0 * double(shape_.layers) * double(shape_.width) * double(shape_.tokens()) * item * (guided ? 2 : 1);
}

std::int64_t Flow::default_batch(bool guided) const {
  return static_cast<std::int64_t>(std::clamp(kCacheBudget / cache_row(guided), 1.0, double(kLargestBatch)));
}

}  // namespace tarflow::internal
