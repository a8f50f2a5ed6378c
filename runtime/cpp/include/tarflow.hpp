// tarflow::Flow: the C API of tarflow.h as a class, with exceptions. Header only.
//
//     tarflow::Flow flow("tarflow-bundle");
//     std::vector<float> images = flow.sample({0, 1, 2});  // (3, channels, size, size) in [-1, 1] units, unclipped
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tarflow.h"

namespace tarflow {

// `status` is one of TARFLOW_INPUT ... TARFLOW_DEFECT.
class Error : public std::runtime_error {
 public:
  Error(int status, const std::string& message) : std::runtime_error(message), status(status) {}
  const int status;
};

struct OpenOptions : tarflow_open_options {
  OpenOptions() : tarflow_open_options(tarflow_open_defaults()) {}
};

struct SampleOptions : tarflow_sample_options {
  SampleOptions() : tarflow_sample_options(tarflow_sample_defaults()) {}
};

// An open bundle. One call at a time, from any thread; only cancel() may be called at any moment. Arrays are as in
// tarflow.h, in vectors; their sizes are checked. Every function but cancel() throws Error.
class Flow {
 public:
  explicit Flow(const std::string& bundle, const OpenOptions& options = {}) {
    tarflow_flow* made = nullptr;
    const int status = tarflow_open(bundle.c_str(), &options, &made);
    handle_.reset(made);
    check(status);
    read_shape();
  }

  // Another handle on the same weights, for another thread.
  Flow share() {
    tarflow_flow* made = nullptr;
    check(tarflow_share(handle_.get(), &made));
    return Flow(made);
  }

  const tarflow_shape& shape() const { return shape_; }

  // What a class is called; its number, if the bundle does not say.
  std::string class_name(std::int64_t label) const {
    const char* name = tarflow_class_name(handle_.get(), label);
    return name == nullptr ? std::to_string(label) : name;
  }

  // One sample a label; -1 for none.
  std::vector<float> sample(const std::vector<std::int64_t>& labels, const SampleOptions& options = {}) {
    std::vector<float> images(numbers(labels.size()));
    check(tarflow_sample(handle_.get(), count(labels.size()), labels.data(), &options, images.data()));
    return images;
  }

  // noise: (labels.size(), tokens, patch_dim).
  std::vector<float> decode(const std::vector<float>& noise, const std::vector<std::int64_t>& labels,
                            const SampleOptions& options = {}) {
    require(noise, labels, "noise");
    std::vector<float> images(noise.size());
    check(tarflow_decode(handle_.get(), count(labels.size()), noise.data(), labels.data(), &options, images.data()));
    return images;
  }

  // Round-trip errors of the last n samples, which must have been drawn with certify = 1.
  std::vector<float> certificate(std::size_t n) {
    std::vector<float> errors(n);
    check(tarflow_certificate(handle_.get(), count(n), errors.data()));
    return errors;
  }

  // Log-densities in nats of the last n raw samples, which must have been drawn with certify = 1.
  std::vector<double> log_prob(std::size_t n) {
    std::vector<double> nats(n);
    check(tarflow_log_prob(handle_.get(), count(n), nats.data()));
    return nats;
  }

  // Rows of the last call's results that are not finite.
  std::vector<std::int64_t> nonfinite() {
    std::int64_t found = 0;
    check(tarflow_nonfinite(handle_.get(), nullptr, 0, &found));
    std::vector<std::int64_t> rows(static_cast<std::size_t>(found));
    check(tarflow_nonfinite(handle_.get(), rows.data(), found, &found));
    return rows;
  }

  // Latents (n, tokens, patch_dim) and log-determinants (n) in nats per dimension.
  std::pair<std::vector<float>, std::vector<float>> encode(const std::vector<float>& images,
                                                           const std::vector<std::int64_t>& labels) {
    require(images, labels, "images");
    std::vector<float> latents(images.size()), log_det(labels.size());
    check(tarflow_encode(handle_.get(), count(labels.size()), images.data(), labels.data(), latents.data(),
                         log_det.data()));
    return {std::move(latents), std::move(log_det)};
  }

  // log p(image | label) in nats.
  std::vector<float> log_likelihood(const std::vector<float>& images, const std::vector<std::int64_t>& labels) {
    require(images, labels, "images");
    std::vector<float> nats(labels.size());
    check(tarflow_log_likelihood(handle_.get(), count(labels.size()), images.data(), labels.data(), nats.data()));
    return nats;
  }

  std::vector<float> denoise(const std::vector<float>& images, const std::vector<std::int64_t>& labels,
                             double strength = 1.0) {
    require(images, labels, "images");
    std::vector<float> denoised(images.size());
    check(
        tarflow_denoise(handle_.get(), count(labels.size()), images.data(), labels.data(), strength, denoised.data()));
    return denoised;
  }

  std::vector<float> noise(std::uint64_t seed, std::uint64_t first, std::size_t n) {
    std::vector<float> noise(numbers(n));
    check(tarflow_noise(handle_.get(), seed, first, count(n), noise.data()));
    return noise;
  }

  // From any thread: the running call throws Error(TARFLOW_CANCELLED).
  void cancel() noexcept { tarflow_cancel(handle_.get()); }

 private:
  struct Close {
    void operator()(tarflow_flow* flow) const noexcept { tarflow_close(flow); }
  };

  explicit Flow(tarflow_flow* made) : handle_(made) { read_shape(); }

  void read_shape() { check(tarflow_get_shape(handle_.get(), &shape_)); }

  void check(int status) {
    if (status == TARFLOW_BUSY) throw Error(status, "another thread's call runs on this flow; share() makes another");
    if (status != TARFLOW_OK) throw Error(status, tarflow_error(handle_.get()));
  }

  void require(const std::vector<float>& array, const std::vector<std::int64_t>& labels, const char* name) const {
    if (array.size() == numbers(labels.size())) return;
    throw Error(TARFLOW_INPUT, "`" + std::string(name) + "` has " + std::to_string(array.size()) +
                                   " numbers; expected " + std::to_string(numbers(labels.size())) + " for " +
                                   std::to_string(labels.size()) + " labels");
  }

  std::size_t numbers(std::size_t n) const { return n * static_cast<std::size_t>(shape_.image_numbers); }
  static tarflow_shape sized_shape() {
    tarflow_shape shape{};
    shape.size = sizeof shape;
    return shape;
  }
  static std::int64_t count(std::size_t n) { return static_cast<std::int64_t>(n); }

  std::unique_ptr<tarflow_flow, Close> handle_;
  tarflow_shape shape_ = sized_shape();
};

}  // namespace tarflow
