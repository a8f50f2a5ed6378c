// What a bundle says about itself: FORMAT.md, "Manifest" and "Weights". Readers of untrusted bytes, and nothing else.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "precision.hpp"

namespace tarflow::internal {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kWeights = "weights.safetensors";
constexpr std::size_t kManifestLimit = std::size_t{16} << 20;           // bytes; kilobytes are normal
constexpr std::uint64_t kWeightsHeaderLimit = std::uint64_t{64} << 20;  // bytes

struct ModelShape {
  std::int64_t image_size, channels, patch_size, width, blocks, layers, classes, head_dim;
  bool nvp;
  std::optional<double> noise_std;  // none: trained with uniform dequantisation

  std::int64_t tokens() const { return (image_size / patch_size) * (image_size / patch_size); }  // T
  std::int64_t patch_dim() const { return channels * patch_size * patch_size; }                  // D
  std::int64_t heads() const { return width / head_dim; }
  std::int64_t numbers() const { return tokens() * patch_dim(); }  // of one image
};

bool operator==(const ModelShape& a, const ModelShape& b);

enum Kind { kStep, kForward, kGradient, kResident, kCuda, kCudaGuided };  // others, of other versions, are left alone
constexpr std::array<const char*, 6> kKindNames = {"step", "forward", "gradient", "resident", "cuda", "cuda_guided"};

struct BlockEntry {
  bool reversed;
  std::array<std::string, kKindNames.size()> graphs;  // file names by Kind; those behind kGradient may be empty
};

struct FileEntry {
  std::string sha256;
  std::uint64_t size;
};

struct Manifest {
  // Bytes of keys and values that one image takes in one guidance branch.
  double cache_bytes() const {
    return 2.0 * double(shape.layers) * double(shape.width) * double(shape.tokens()) * double(precision->cache_bytes);
  }

  std::string name;
  const Precision* precision;
  ModelShape shape;
  std::vector<std::string> class_names;  // one a class, or none at all
  std::vector<BlockEntry> blocks;
  std::map<std::string, FileEntry> files;
  std::set<std::string> graphs;    // names of all blocks' files that may be run
  std::set<std::string> for_cuda;  // and of those among them that the CUDA provider alone may run
  bool vouched_int8 = false;       // the parity card found native decoding in int8 within its tolerance
};

// Throws Error(TARFLOW_BUNDLE) with `source` and the place in it.
Manifest read_manifest(std::string_view content, const std::string& source);

// The JSON header of a safetensors file, without the eight bytes before it; `room` bytes of tensors follow it.
struct WeightsHeader {
  ModelShape shape;
  std::uint64_t variance;  // where "var" (T, D) begins, bytes after the header; float32
};

// Throws Error(TARFLOW_BUNDLE) with `source` and the place in it, also if the tensors are not of the sizes that the
// shape claims: nothing larger than the file need be made to find that out.
WeightsHeader read_weights_header(std::string_view content, std::uint64_t room, const std::string& source);

}  // namespace tarflow::internal
