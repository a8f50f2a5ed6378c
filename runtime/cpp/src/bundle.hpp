// An opened bundle folder: its manifest, and paths to files known to be inside it and unchanged.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "files.hpp"
#include "manifest.hpp"

namespace tarflow::internal {

// What a folder holds; on an error, what was seen until then.
std::vector<std::filesystem::path> entries_of(const std::string& folder, std::error_code& error);

class Bundle {
 public:
  // Reads the manifest and checks sizes, hashes, what graphs may do, that nothing leads out of the folder, that no file
  // is there which the manifest does not name, and that the weights are of the model it describes. Throws
  // Error(TARFLOW_BUNDLE), or Error(TARFLOW_MACHINE) where a limit of the machine was in the way.
  explicit Bundle(const std::string& folder);

  std::string path(const std::string& name) const;
  const std::string& graph(std::size_t block, Kind kind) const { return manifest.blocks[block].graphs[kind]; }

  // Throws Error(TARFLOW_BUNDLE) unless a file is the one whose hash was checked.
  void require_unchanged(const std::string& name) const;

  // The weights whose hash was checked, open: whatever is at their path by now.
  const File& weights() const { return *weights_; }

  bool has(Kind kind) const { return !manifest.blocks.front().graphs[kind].empty(); }

  std::string folder;
  Manifest manifest;
  std::string hash;              // SHA-256 of the manifest, which names every other file's: the bundle's identity
  std::vector<float> deviation;  // (T, D): what noise is multiplied by to become a latent

 private:
  void check_size(const std::string& name, const FileEntry& entry) const;
  void check_content(const std::string& name, const FileEntry& entry);
  void refuse_strangers() const;
  void read_prior();

  std::unique_ptr<File> weights_;
  std::map<std::string, Identity> identities_;  // of every file whose hash was checked
};

}  // namespace tarflow::internal
