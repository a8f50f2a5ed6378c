#include "flow.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "noise.hpp"
#include "ort.hpp"
#include "tensorrt.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kTile = 16;  // of a reproducible run; the same as Python's
constexpr std::uint32_t kRedraws = 8;
constexpr double kCacheBudget = 0x1p31;  // bytes of KV cache a default batch may take
constexpr std::int64_t kLargestBatch = 64;
constexpr double kLargestCache = 0x1p50;   // bytes; beyond what machines have, and far from where integers overflow
constexpr double kLargestResult = 0x1p40;  // bytes; a slip of the keyboard, not a request

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

bool finite(const float* numbers, std::int64_t count) {
  return std::all_of(numbers, numbers + count, [](float number) { return std::isfinite(number); });
}

// Calls visit(pixel, number) for every number of an image (channels, size, size) and of its patches (T, D).
template <class Visit>
void match(const ModelShape& shape, const Visit& visit) {
  const std::int64_t side = shape.image_size / shape.patch_size, patch = shape.patch_size;
  std::int64_t number = 0;
  for (std::int64_t row = 0; row < side; ++row) {
    for (std::int64_t column = 0; column < side; ++column) {
      for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
        for (std::int64_t y = 0; y < patch; ++y) {
          const std::int64_t pixel = (channel * shape.image_size + row * patch + y) * shape.image_size + column * patch;
          for (std::int64_t x = 0; x < patch; ++x) visit(pixel + x, number++);
        }
      }
    }
  }
}

void patchify(const ModelShape& shape, std::int64_t n, const float* images, float* patches) {
  for (std::int64_t i = 0; i < n; ++i, images += shape.numbers(), patches += shape.numbers()) {
    match(shape, [&](std::int64_t pixel, std::int64_t number) { patches[number] = images[pixel]; });
  }
}

void unpatchify(const ModelShape& shape, std::int64_t n, const float* patches, float* images) {
  for (std::int64_t i = 0; i < n; ++i, images += shape.numbers(), patches += shape.numbers()) {
    match(shape, [&](std::int64_t pixel, std::int64_t number) { images[pixel] = patches[number]; });
  }
}

std::string number(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  return text.back() == '.' ? text + "0" : text;
}

std::unique_ptr<Backend> open_backend(const std::string& provider, const Bundle& bundle,
                                      const tarflow_open_options& options) {
  if (provider == "tensorrt") return open_tensorrt(bundle, options.low_memory != 0);
  EngineOptions engine;
  engine.provider = provider;
  engine.library = options.onnxruntime != nullptr ? options.onnxruntime : "";
  engine.threads = options.threads;
  engine.spinning = options.spinning != 0;
  engine.low_memory = options.low_memory != 0;
  return std::make_unique<OrtBackend>(bundle, engine);
}

}  // namespace

std::shared_ptr<Opened> open_bundle(const std::string& folder, const tarflow_open_options& options) {
  const std::string provider = options.provider != nullptr ? options.provider : "cpu";
  if (provider != "auto" && provider != "cpu" && provider != "cuda" && provider != "ort-tensorrt" &&
      provider != "tensorrt") {
    throw input_error("provider '" + provider +
                      "' is unknown; expected one of auto, cpu, cuda, tensorrt, ort-tensorrt");
  }
  if (options.threads < 0) {
    throw input_error("threads is " + std::to_string(options.threads) + "; expected 1 or more, or 0 for one a core");
  }
  auto opened = std::make_shared<Opened>(folder, options.log, options.user);
  std::string reasons;
  if (provider == "auto") {
    for (const char* name : {"tensorrt", "cuda"}) {
      try {
        opened->backend = open_backend(name, opened->bundle, options);
        break;
      } catch (const std::exception& error) {
        const std::string why = error.what();
        reasons += std::string("; not ") + name + ": " + why.substr(0, why.find("; "));
      }
    }
  }
  if (!opened->backend) opened->backend = open_backend(provider == "auto" ? "cpu" : provider, opened->bundle, options);
  opened->backend_description = opened->backend->description() + reasons;
  opened->say(TARFLOW_LOG_INFO, "opened '" + folder + "' on " + opened->backend_description);
  return opened;
}

void Opened::say(int level, const std::string& message) const {
  if (log != nullptr && log(user, level, message.c_str()) != 0) throw Cancelled();
}

struct Flow::Run {
  std::int64_t n;
  const float* noise;  // of all n samples, or null
  std::vector<std::int64_t> labels;
  tarflow_sample_options options;
  double strength;  // of denoising; below 0: none
  std::int64_t tile, done, total;
  std::vector<float> certificate;
};

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

// Rows of one batch from sample index `start` on: those asked for begin at row `before` and go to `output` of the
// run's.
struct Flow::Tile {
  std::uint64_t start;
  std::int64_t rows, before, inside, output;
};

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
  if (run.options.certify != 0) {
    std::vector<float> errors(size(rows));
    round_trip(x, z, guided, errors.data());
    std::copy_n(errors.begin() + tile.before, tile.inside, run.certificate.begin() + tile.output);
  }
  if (run.strength >= 0) denoise_patches(x, branches(nullptr, labels), run.strength);
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
  if (!(strength >= 0)) {
    throw input_error("denoising strength is " + number(strength) +
                      "; expected a number of 0 or more, 1 is the theory's");
  }
  const double checked = checked_strength(strength);
  in_batches(n, images, labels, [&](std::int64_t start, std::vector<float>& x, const Branches& plain) {
    denoise_patches(x, plain, checked);
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

// Encodes keeping every block's input, then walks the gradient of log p back through the blocks (Tweedie).
void Flow::denoise_patches(std::vector<float>& x, const Branches& plain, double strength) {
  std::vector<std::vector<float>> states{x};
  std::vector<float> log_det(size(plain.batch));
  for (std::size_t block = 0; block < size(shape_.blocks); ++block) {
    std::vector<float> z(x.size());
    opened->backend->forward(call, block, states.back().data(), plain, z.data(), log_det.data());
    states.push_back(std::move(z));
  }
  std::vector<float> grad = std::move(states.back());
  states.pop_back();
  for (float& value : grad) value = -value;
  for (std::size_t block = size(shape_.blocks); block-- > 0; states.pop_back()) {
    opened->backend->gradient(call, block, states.back().data(), plain, grad.data());
  }
  const auto factor = static_cast<float>(strength * (*shape_.noise_std * *shape_.noise_std));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += factor * grad[i];
}

void Flow::round_trip(const std::vector<float>& x, const std::vector<float>& z, const Branches& branches,
                      float* errors) {
  std::vector<float> found = x, log_det;
  encode_patches(found, branches, log_det);
  const std::size_t numbers = size(shape_.numbers());
  for (std::size_t row = 0; row < size(branches.batch); ++row) {
    errors[row] = 0;
    for (std::size_t k = 0; k < numbers; ++k) {
      const float error = std::fabs(found[row * numbers + k] - z[row * numbers + k] * opened->bundle.deviation[k]);
      if (!(error <= errors[row])) errors[row] = error;  // NaN stays
      if (std::isnan(error)) break;
    }
  }
}

// --- what the caller said, checked -----------------------------------------------------------------------------------

Flow::Run Flow::plan(std::int64_t n, const float* noise, const std::int64_t* labels,
                     const tarflow_sample_options& options) const {
  if (n < 1) throw input_error("n is " + std::to_string(n) + "; expected 1 or more samples");
  if (double(n) * double(shape_.numbers()) * sizeof(float) > kLargestResult) {
    throw input_error("n is " + std::to_string(n) +
                      ": more than 1 TiB of samples; draw them in parts, by first_sample");
  }
  if (static_cast<std::uint64_t>(n - 1) > UINT64_MAX - options.first_sample) {
    throw input_error("first_sample is " + std::to_string(options.first_sample) + " and n " + std::to_string(n) +
                      "; sample indices end at 2^64 - 1");
  }
  if (noise != nullptr) {
    for (std::int64_t row = 0; row < n; ++row) {
      if (!finite(noise + row * shape_.numbers(), shape_.numbers())) {
        throw input_error("noise is not finite, first in row " + std::to_string(row));
      }
    }
    if (options.redraw_nonfinite != 0) {
      throw input_error("samples of given noise cannot be redrawn: drop redraw_nonfinite, or draw by seed");
    }
  }
  const std::string guided = options.guided != nullptr ? options.guided : "ab";
  if (!(options.guidance >= 0) || !std::isfinite(options.guidance)) {
    throw input_error("guidance scale is " + number(options.guidance) +
                      "; expected 0 (none) or a positive number, 1 to 3 is usual");
  }
  if (guided != "a" && guided != "b" && guided != "ab") {
    throw input_error("guidance of '" + guided + "' is unknown; expected ab, a (log_scale) or b (shift)");
  }
  const double temperature = options.attention_temperature;
  if (!(temperature > 0) || !std::isfinite(temperature)) {
    throw input_error("attention temperature is " + number(temperature) + "; expected a positive number");
  }
  Run run{n, noise, classes(n, labels), options, -1.0, 0, 0, 0, {}};
  run.options.guided = guided == "a" ? "a" : guided == "b" ? "b" : "ab";
  const bool unlabelled =
      std::all_of(run.labels.begin(), run.labels.end(), [&](std::int64_t label) { return label == shape_.classes; });
  if (options.guidance == 0 && temperature != 1) {
    throw input_error("attention temperature " + number(temperature) +
                      " does nothing without guidance; give a guidance scale above 0 too");
  }
  if (options.guidance > 0 && guided == "a" && !shape_.nvp) {
    throw input_error("a volume-preserving model has no log_scale, so guiding 'a' does nothing; guide 'b'");
  }
  if (options.guidance > 0 && temperature == 1 && unlabelled) {
    throw input_error("guidance " + number(options.guidance) +
                      " does nothing for samples without a label at attention temperature 1: both branches are the "
                      "same, at twice the cost; " +
                      (shape_.classes > 0 ? "give labels, or " : "") +
                      "pass an attention temperature other than 1, or guidance 0");
  }
  if (options.batch_size < 0) {
    throw input_error("batch size is " + std::to_string(options.batch_size) + "; expected 1 or more, or 0");
  }
  if (options.denoise == TARFLOW_DENOISE_AS_TRAINED) {
    run.strength = shape_.noise_std.value_or(0) > 0 ? 1.0 : -1.0;
  } else if (options.denoise != 0) {
    run.strength = checked_strength(options.denoise);
  }
  run.tile = options.reproducible != 0 ? kTile
             : options.batch_size > 0  ? std::min(options.batch_size, n)
                                       : default_batch(options.guidance > 0);
  if (cache_row(options.guidance > 0) * double(run.tile) > kLargestCache) throw std::bad_alloc();
  const auto tile = static_cast<std::uint64_t>(run.tile);
  const std::uint64_t offset = options.reproducible != 0 ? options.first_sample % tile : 0;
  const auto tiles = static_cast<std::int64_t>((offset + static_cast<std::uint64_t>(n) + tile - 1) / tile);
  run.total = tiles * shape_.blocks * (shape_.tokens() - 1);
  return run;
}

double Flow::checked_strength(double strength) const {
  if (!shape_.noise_std) {
    throw input_error(
        "this model was trained with uniform dequantisation: there is no Gaussian noise to remove; set denoise to 0");
  }
  if (!(strength >= 0) || !std::isfinite(strength)) {
    throw input_error("denoising strength is " + number(strength) +
                      "; expected a number of 0 or more, 1 is the theory's");
  }
  return strength;
}

// As the graphs take them: the null class comes after the last.
std::vector<std::int64_t> Flow::classes(std::int64_t n, const std::int64_t* labels) const {
  std::vector<std::int64_t> all(size(n), shape_.classes);
  for (std::int64_t i = 0; labels != nullptr && i < n; ++i) {
    if (labels[i] < 0) continue;
    if (shape_.classes == 0) throw input_error("this model is unconditional and takes no labels; drop them");
    if (labels[i] >= shape_.classes) {
      throw input_error("label " + std::to_string(labels[i]) + " is out of range; this model has classes 0 to " +
                        std::to_string(shape_.classes - 1) + ", and -1 for none");
    }
    all[size(i)] = labels[i];
  }
  return all;
}

void Flow::check_images(std::int64_t n, const float* images) const {
  for (std::int64_t row = 0; row < n; ++row) {
    if (!finite(images + row * shape_.numbers(), shape_.numbers())) {
      throw input_error("images are not finite, first in row " + std::to_string(row));
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
