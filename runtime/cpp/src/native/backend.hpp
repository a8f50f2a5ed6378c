// The backend for CPUs whose bits are the same on all of them: blocks are decoded by the native library, encoded and
// differentiated by ONNX Runtime. So a certificate checks one engine with another.
#pragma once

#include <memory>

#include "files.hpp"
#include "native.h"
#include "ort/backend.hpp"

namespace tarflow::internal {

// Why "auto" leaves a bundle to ONNX Runtime, in a few words; empty where it takes the native engine. docs/NATIVE.md has
// the rule. Throws Error(TARFLOW_INPUT) if TARFLOW_ISA names what is not here.
std::string why_not_native(const Manifest& manifest);

class NativeBackend final : public Backend {
 public:
  // Throws Error: TARFLOW_MACHINE where ONNX Runtime is not to be had, TARFLOW_INPUT if TARFLOW_ISA names an instruction
  // set that is not here, TARFLOW_BUNDLE for weights that are not of this model.
  NativeBackend(const Bundle& bundle, const Opening& opening);

  void prepare(Call& call) const override { graphs_.prepare(call); }
  void invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) override;
  void forward(const Pass& pass, const float* x, float* z, float* log_det) override {
    graphs_.forward(pass, x, z, log_det);
  }
  void gradient(const Pass& pass, const float* x, float* grad) override { graphs_.gradient(pass, x, grad); }
  std::string description() const override;

 private:
  struct Close {
    void operator()(tarflow_native_model* model) const { tarflow_native_close(model); }
  };

  const Bundle& bundle_;
  const ModelShape& shape_;
  const std::string precision_;
  const int threads_;
  OrtBackend graphs_;
  const Mapping weights_;
  std::unique_ptr<tarflow_native_model, Close> model_;  // reads the weights until it is closed
};

}  // namespace tarflow::internal
