// The record of built TensorRT engines, BUNDLE/engines/*/engines.json: FORMAT.md, "Engines". Needs no TensorRT.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tarflow::internal {

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
  std::string bundle, precision, package, version, gpu;  // `gpu` empty: any of these capabilities
  std::vector<std::string> capabilities;
  std::map<std::string, std::vector<Profile>> profiles;  // by kind
  std::map<std::string, EngineEntry> engines;            // by file name

  // The file of a block's engine; empty if there is none.
  std::string file(std::size_t block, const std::string& kind) const;

  // Why these engines cannot run here; empty if they can.
  std::string misfit(const std::string& bundle_hash, std::size_t blocks, const Here& here) const;

  // The command that builds the like of them on the machine it runs on: everything the record knows of the first one.
  std::string rebuild(const std::string& folder, const Here& here) const;
};

// Throws Error(TARFLOW_BUNDLE).
Record read_record(std::string_view content, const std::string& source);

}  // namespace tarflow::internal
