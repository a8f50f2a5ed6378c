// An opened bundle folder: its manifest, and paths to files known to be inside it and unchanged.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "manifest.hpp"

namespace tarflow::internal {

// SHA-256 of a file, in lower-case hexadecimal. Throws Error(TARFLOW_BUNDLE).
std::string sha256_of(const std::string& path);
std::string sha256(std::string_view content);

// What a folder holds; on an error, what was seen until then.
std::vector<std::filesystem::path> entries_of(const std::string& folder, std::error_code& error);

class Bundle {
 public:
  // Reads the manifest and checks sizes, hashes, that nothing leads out of the folder, that no file is there which
  // the manifest does not name, and that the weights are of the model it describes. Throws Error(TARFLOW_BUNDLE).
  explicit Bundle(const std::string& folder);

  std::string path(const std::string& name) const;
  std::string graph(std::size_t block, Kind kind) const { return path(manifest.blocks[block].graphs[kind]); }
  bool has(Kind kind) const { return !manifest.blocks.front().graphs[kind].empty(); }

  std::string folder;
  Manifest manifest;
  std::string hash;              // SHA-256 of the manifest, which names every other file's: the bundle's identity
  std::vector<float> deviation;  // (T, D): what noise is multiplied by to become a latent

 private:
  void check_files() const;
  void refuse_strangers() const;
  void read_prior();
};

}  // namespace tarflow::internal
