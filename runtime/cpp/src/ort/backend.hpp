// The backend on ONNX Runtime.
#pragma once

#include "ort/resident.hpp"

namespace tarflow::internal {

class OrtBackend final : public Backend {
 public:
  // `resident` keeps the state of decoding where the provider computes. Throws Error: TARFLOW_MACHINE if the library or
  // the provider is not to be had, TARFLOW_BUNDLE for a bundle without the graphs that it needs there.
  OrtBackend(const Bundle& bundle, const Opening& opening, bool resident);

  void prepare(Call& call) const override;
  void invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) override;
  void forward(const Pass& pass, const float* x, float* z, float* log_det) override;
  void gradient(const Pass& pass, const float* x, float* grad) override;
  std::string description() const override { return sessions_.description(); }

 private:
  std::int64_t rows_that_fit(std::int64_t attention, std::int64_t hidden) const;

  const ModelShape& shape_;
  const bool resident_;
  Sessions sessions_;
  IdleSteps idle_;  // of the sessions
};

}  // namespace tarflow::internal
