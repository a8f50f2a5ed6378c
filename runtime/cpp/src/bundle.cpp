#include "bundle.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>

#include "error.hpp"

namespace tarflow::internal {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCopyAgain = "Copy the bundle again, or export it again";

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) failed();
  }

  void add(const char* data, std::size_t size) {
    if (EVP_DigestUpdate(context_.get(), data, size) != 1) failed();
  }

  std::string hex() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int size = 0;
    if (EVP_DigestFinal_ex(context_.get(), digest.data(), &size) != 1) failed();
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += "0123456789abcdef"[digest[i] >> 4];
      text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
  }

 private:
  [[noreturn]] static void failed() { throw machine_error("OpenSSL cannot compute SHA-256 on this machine"); }

  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

std::ifstream open_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw bundle_error("'" + path + "' cannot be read: " + std::strerror(errno));
  return file;
}

// Links followed, a regular file inside the folder.
void require_inside(const fs::path& folder, const fs::path& path) {
  std::error_code error;
  const fs::path resolved = fs::canonical(path, error);
  if (error) throw bundle_error("'" + path.string() + "' is missing, though the manifest names it. " + kCopyAgain);
  const fs::path root = fs::canonical(folder, error);
  const auto [at, rest] = std::mismatch(root.begin(), root.end(), resolved.begin(), resolved.end());
  if (error || at != root.end() || rest == resolved.end() || !fs::is_regular_file(resolved, error)) {
    throw bundle_error("'" + path.string() +
                       "' leads out of the bundle or is no regular file; a bundle's files lie inside it");
  }
}

}  // namespace

std::string sha256_of(const std::string& path) {
  std::ifstream file = open_file(path);
  Sha256 hash;
  std::vector<char> chunk(1 << 20);
  while (file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    hash.add(chunk.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) throw bundle_error("'" + path + "' cannot be read to its end");
  return hash.hex();
}

std::string sha256(std::string_view content) {
  Sha256 hash;
  hash.add(content.data(), content.size());
  return hash.hex();
}

std::vector<std::filesystem::path> entries_of(const std::string& folder, std::error_code& error) {
  std::vector<fs::path> found;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) found.push_back(*at);
  return found;
}

Bundle::Bundle(const std::string& folder) : folder(folder) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    throw bundle_error("no bundle at '" + folder + "': expected a folder with " + kManifest + "; export one");
  }
  const fs::path path = fs::path(folder) / kManifest;
  if (!fs::exists(fs::symlink_status(path, error))) {
    throw bundle_error("'" + folder + "' has no " + kManifest + ", so it is not a bundle; export one");
  }
  require_inside(folder, path);
  std::ifstream file = open_file(path.string());
  std::string content(kManifestLimit + 1, '\0');
  file.read(content.data(), static_cast<std::streamsize>(content.size()));
  content.resize(static_cast<std::size_t>(file.gcount()));
  if (content.size() > kManifestLimit) {
    throw bundle_error("'" + path.string() + "' is larger than 16 MiB; a manifest is not. " + kCopyAgain);
  }
  manifest = read_manifest(content, path.string());
  hash = sha256(content);
  check_files();
  refuse_strangers();
  read_prior();
}

std::string Bundle::path(const std::string& name) const { return (fs::path(folder) / name).string(); }

void Bundle::check_files() const {
  for (const auto& [name, entry] : manifest.files) {
    require_inside(folder, path(name));
    std::error_code error;
    const std::uintmax_t size = fs::file_size(path(name), error);
    if (error || size != entry.size) {
      throw bundle_error("'" + path(name) + "' has " + std::to_string(error ? 0 : size) + " bytes; the manifest says " +
                         std::to_string(entry.size) + ": it is truncated or changed. " + kCopyAgain);
    }
  }
  for (const auto& [name, entry] : manifest.files) {
    if (name == "golden.safetensors" || name == "PARITY.md") continue;  // nothing here reads them
    const std::string found = sha256_of(path(name));
    if (found != entry.sha256) {
      throw bundle_error("'" + path(name) + "' is damaged or was changed: its SHA-256 is " + found.substr(0, 16) +
                         "..., the manifest says " + entry.sha256.substr(0, 16) + "... " + kCopyAgain);
    }
  }
}

void Bundle::refuse_strangers() const {
  std::set<std::string> strange;
  std::error_code error;
  const std::vector<fs::path> entries = entries_of(folder, error);
  if (error) throw bundle_error("'" + folder + "' cannot be listed: " + error.message());
  for (const fs::path& entry : entries) {
    const std::string name = entry.filename().string();
    if (!fs::is_directory(entry, error) && name != kManifest && !manifest.files.count(name)) strange.insert(name);
  }
  if (!strange.empty()) {  // a graph could read its weights from there, unhashed
    throw bundle_error("'" + folder + "' holds files its manifest does not name, such as '" + *strange.begin() +
                       "'; remove them, or copy the bundle again");
  }
}

void Bundle::read_prior() {
  const std::string where = path(kWeights);
  std::ifstream file = open_file(where);
  std::array<unsigned char, 8> length_bytes{};
  file.read(reinterpret_cast<char*>(length_bytes.data()), 8);
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | length_bytes[static_cast<std::size_t>(i)];
  const std::uint64_t size = manifest.files.at(kWeights).size;
  if (!file || size < 8 || length > size - 8 || length > kWeightsHeaderLimit) {
    throw bundle_error("'" + where + "' is no safetensors file. " + kCopyAgain);
  }
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const WeightsHeader weights = read_weights_header(header, size - 8 - length, where);
  if (!(weights.shape == manifest.shape)) {
    throw bundle_error("'" + folder + "': the manifest describes another model than its weights do. " + kCopyAgain);
  }
  const std::int64_t tokens = manifest.shape.tokens(), patch_dim = manifest.shape.patch_dim();
  deviation.assign(static_cast<std::size_t>(tokens * patch_dim), 1.0F);
  if (manifest.shape.nvp) return;
  const std::uint64_t bytes = deviation.size() * sizeof(float);
  const bool fits = weights.variance && weights.variance->type == "F32" &&
                    weights.variance->shape == std::vector<std::int64_t>{tokens, patch_dim} &&
                    weights.variance->end - weights.variance->begin == bytes;
  if (fits) {
    file.seekg(static_cast<std::streamoff>(8 + length + weights.variance->begin));
    file.read(reinterpret_cast<char*>(deviation.data()), static_cast<std::streamsize>(bytes));
  }
  const auto sound = [](float variance) { return std::isfinite(variance) && variance >= 0; };
  if (!fits || !file || !std::all_of(deviation.begin(), deviation.end(), sound)) {
    throw bundle_error("'" + where + "': the prior variance 'var' is missing or not float32 (" +
                       std::to_string(tokens) + ", " + std::to_string(patch_dim) + "), finite and not negative. " +
                       kCopyAgain);
  }
  for (float& value : deviation) value = std::sqrt(value);
}

}  // namespace tarflow::internal
