// Flow: draws samples, encodes images, denoises, and says how far each sample can be trusted. FORMAT.md, "Sampling".
// Arrays as in tarflow.h; inside, samples are (B, T, D) patches in patch order.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend.hpp"
#include "tarflow.h"

namespace tarflow::internal {

// What handles that share weights have in common.
struct Opened {
  Opened(const std::string& folder, tarflow_log log, void* user) : bundle(folder), log(log), user(user) {}

  // Throws Cancelled if the callback says so.
  void say(int level, const std::string& message) const;

  Bundle bundle;
  std::unique_ptr<Backend> backend;  // refers to `bundle`
  std::string backend_description;
  const tarflow_log log;
  void* const user;
};

// Opens a bundle on "cpu", "cuda", "tensorrt" or "auto".
std::shared_ptr<Opened> open_bundle(const std::string& folder, const tarflow_open_options& options);

class Flow {
 public:
  explicit Flow(std::shared_ptr<Opened> opened);

  // `noise` may be null: samples are then drawn by seed.
  void sample(std::int64_t n, const float* noise, const std::int64_t* labels, const tarflow_sample_options& options,
              float* images);
  void encode(std::int64_t n, const float* images, const std::int64_t* labels, float* latents, float* log_det);
  void log_likelihood(std::int64_t n, const float* images, const std::int64_t* labels, float* nats);
  void denoise(std::int64_t n, const float* images, const std::int64_t* labels, double strength, float* denoised);
  void noise(std::uint64_t seed, std::uint64_t first, std::int64_t n, float* noise) const;

  const std::shared_ptr<Opened> opened;
  Call call;
  std::vector<float> certificate;  // of the last sample(), if asked for

 private:
  struct Run;   // one call of sample(): what was asked for, checked
  struct Tile;  // one batch of it
  using States = std::vector<std::vector<float>>;

  Run plan(std::int64_t n, const float* noise, const std::int64_t* labels, const tarflow_sample_options& options) const;
  void draw(Run& run, std::uint64_t start, std::int64_t rows, float* images);
  void decode(Run& run, const Tile* tile, const std::vector<float>& z, const Branches& branches, std::vector<float>& x);
  void warn_of_nonfinite(const Run& run, const float* images) const;
  void redraw(Run& run, const Tile& tile, std::vector<float>& z, const Branches& branches, std::vector<float>& x);
  void encode_patches(std::vector<float>& x, const Branches& branches, std::vector<float>& log_det);
  States encode_states(const std::vector<float>& x, const Branches& branches);
  void denoise_patches(std::vector<float>& x, const Branches& plain, double strength, States states);
  void round_trip(const std::vector<float>& found, const std::vector<float>& z, float* errors) const;
  double checked_strength(double strength) const;
  std::vector<std::int64_t> classes(std::int64_t n, const std::int64_t* labels) const;
  void check_images(std::int64_t n, const float* images) const;
  Branches branches(const tarflow_sample_options* guidance, std::vector<std::int64_t> labels) const;
  double cache_row(bool guided) const;
  std::int64_t default_batch(bool guided) const;
  template <class Work>
  void in_batches(std::int64_t n, const float* images, const std::int64_t* labels, const Work& work);

  const ModelShape& shape_;
};

}  // namespace tarflow::internal
