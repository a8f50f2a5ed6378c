// Any bytes as manifest.json: a manifest that keeps its promises, or Error(TARFLOW_BUNDLE).
#include <cstdlib>

#include "error.hpp"
#include "manifest.hpp"

using namespace tarflow::internal;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const Manifest manifest = read_manifest({reinterpret_cast<const char*>(data), size}, "manifest.json");
    const ModelShape& shape = manifest.shape;
    bool sound = manifest.precision != nullptr && shape.tokens() >= 1 && shape.patch_dim() >= 1 && shape.heads() >= 1 &&
                 shape.numbers() >= 1 && static_cast<std::int64_t>(manifest.blocks.size()) == shape.blocks;
    for (const BlockEntry& block : manifest.blocks) {
      for (int kind = kStep; kind <= kGradient; ++kind)
        sound = sound && manifest.files.count(block.graphs[static_cast<std::size_t>(kind)]) == 1;
    }
    for (const auto& [name, entry] : manifest.files) {
      sound = sound && !name.empty() && name[0] != '/' && name.find("..") != 0 && entry.sha256.size() == 64;
    }
    if (!sound) std::abort();
  } catch (const Error& error) {
    if (error.status != TARFLOW_BUNDLE || error.what()[0] == '\0') std::abort();
  }
  return 0;
}
