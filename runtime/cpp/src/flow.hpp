// Flow: draws samples, encodes images, denoises, and says how far each sample can be trusted. FORMAT.md, "Sampling".
// Arrays as in tarflow.h; inside, samples are (B, T, D) patches in patch order.
#pragma once

#include <memory>
#include <vector>

#include "chain.hpp"
#include "inputs.hpp"
#include "opened.hpp"
#include "request.hpp"

namespace tarflow::internal {

// One handle: at most one call at a time.
class Flow {
 public:
  explicit Flow(std::shared_ptr<const Opened> opened);

  const Manifest& model() const { return opened->bundle.manifest; }

  // Warns in the log of samples that are not finite.
  void sample(const Request& request, float* images);

  // Either output may be null.
  void encode(const Images& images, float* latents, float* log_det);
  void log_likelihood(const Images& images, float* nats);
  void denoise(const Images& images, double strength, float* denoised);
  void noise(std::uint64_t seed, std::uint64_t first, std::int64_t n, float* noise);

  const std::shared_ptr<const Opened> opened;
  Call call;
  std::vector<float> certificate;       // of the last sample(), if asked for
  std::vector<double> log_prob;         // likewise
  std::vector<std::int64_t> nonfinite;  // rows of the last call's results that are not finite

 private:
  void warn_of_nonfinite(const Request& request) const;
  void note(std::int64_t row, const float* numbers, std::int64_t count);
  template <class Work>
  void in_batches(const Images& images, const Work& work) const;

  const ModelShape& shape_;
  const Chain chain_;
};

}  // namespace tarflow::internal
