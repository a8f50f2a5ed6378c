// How a bundle is opened: what tarflow_open_options says, checked once. Nothing a sample depends on.
#pragma once

#include <string>

#include "tarflow.h"

namespace tarflow::internal {

struct Opening {
  // Throws Error(TARFLOW_INPUT).
  explicit Opening(const tarflow_open_options& said);

  // The same on another provider: one that "auto" stands for.
  Opening(const Opening& like, const char* provider);

  // Whether the native engine was asked for, by its name or by a precision of its own.
  bool native() const { return provider == "native" || !precision.empty(); }

  bool on_cpu() const { return provider == "cpu"; }

  const std::string provider;     // without the device
  const std::string device;       // which GPU, by number or UUID; empty: the first
  const std::string precision;    // the native engine's; empty: the bundle's
  const std::string onnxruntime;  // the library's file; empty: $TARFLOW_ONNXRUNTIME, else as the loader finds it
  const int threads;              // 0: one a core
  const bool spinning, one_block, cuda_graph;
  const tarflow_log log;
  void* const user;
};

}  // namespace tarflow::internal
