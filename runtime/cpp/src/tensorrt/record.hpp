// The record of built TensorRT engines, BUNDLE/engines/*/engines.json: FORMAT.md, "Engines". Needs no TensorRT.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.hpp"

namespace tarflow::internal {

constexpr std::array<Kind, 3> kEngineKinds = {kStep, kForward, kGradient};

struct Profile {
  std::int64_t branches;
  std::array<std::int64_t, 3> batch, window;  // least, best, most
};

struct EngineEntry {
  std::int64_t block;
  std::string kind, sha256;
  std::int64_t size;
};

// A machine: "tensorrt", "11.4.0", "NVIDIA H200", "9.0".
struct Here {
  std::string package, version, gpu, capability;
};

struct Record {
  std::string bundle;
  const Precision* precision;
  std::string package, version, gpu;  // `gpu` empty: any of these capabilities
  std::vector<std::string> capabilities;
  std::array<std::vector<Profile>, 3> profiles;  // by Kind, in the engines' order
  std::map<std::string, EngineEntry> engines;    // by file name

  // The file of a block's engine; empty if there is none.
  std::string file(std::size_t block, Kind kind) const;

  // Why these engines cannot run here; empty if they can.
  std::string misfit(const std::string& bundle_hash, std::size_t blocks, const Here& here) const;
};

// Throws Error(TARFLOW_BUNDLE).
Record read_record(std::string_view content, const std::string& source);

}  // namespace tarflow::internal
