#include "bundle.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <set>

#include "error.hpp"
#include "graph.hpp"

namespace tarflow::internal {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCopyAgain = "Copy the bundle again, or export it again";

// Where a hub's cache keeps the files that a folder's links lead to: REPOSITORY/blobs, of REPOSITORY/snapshots/REVISION
// and folders in that. Empty for other folders.
fs::path blobs_of(const fs::path& root) {
  for (fs::path at = root; at.has_relative_path(); at = at.parent_path()) {
    if (at.parent_path().filename() == "snapshots") return at.parent_path().parent_path() / "blobs";
  }
  return {};
}

// Links followed, a regular file inside the folder, or a blob of the cache that the folder is in.
void require_inside(const fs::path& folder, const fs::path& path) {
  std::error_code error;
  const fs::path resolved = fs::canonical(path, error);
  if (error == std::errc::no_such_file_or_directory || error == std::errc::too_many_symbolic_link_levels) {
    throw bundle_error("'" + path.string() + "' is missing, though the manifest names it. " + kCopyAgain);
  }
  if (error) throw unreadable(path.string(), error.value());
  const fs::path root = fs::canonical(folder, error);
  if (error) throw unreadable(folder, error.value());
  const auto [at, rest] = std::mismatch(root.begin(), root.end(), resolved.begin(), resolved.end());
  const bool inside = (at == root.end() && rest != resolved.end()) || resolved.parent_path() == blobs_of(root);
  if (!inside || !fs::is_regular_file(resolved, error)) {
    throw bundle_error("'" + path.string() +
                       "' leads out of the bundle or is no regular file; a bundle's files lie inside it");
  }
}

// What people, hubs, editors and file systems leave in any folder. Nothing reads it.
bool is_beside(const std::string& name) { return name[0] == '.' || name == "README.md" || name == "LICENSE"; }

}  // namespace

std::vector<std::filesystem::path> entries_of(const std::string& folder, std::error_code& error) {
  std::vector<fs::path> found;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) found.push_back(*at);
  return found;
}

Bundle::Bundle(const std::string& folder) : folder(folder) {
  std::error_code error;
  if (fs::is_regular_file(folder, error)) {
    throw bundle_error("'" + folder + "' is a file; expected a bundle, a folder with " + kManifest);
  }
  if (!fs::is_directory(folder, error)) {
    throw bundle_error("no bundle at '" + folder + "': expected a folder with " + kManifest + "; export one");
  }
  const fs::path at = fs::path(folder) / kManifest;
  if (!fs::exists(fs::symlink_status(at, error))) {
    throw bundle_error("'" + folder + "' has no " + kManifest + ", so it is not a bundle; export one");
  }
  require_inside(folder, at);
  File file(at.string());
  if (file.identity.size > kManifestLimit) {
    throw bundle_error("'" + file.path + "' is larger than 16 MiB; a manifest is not. " + kCopyAgain);
  }
  const std::string content = file.read(file.identity.size);
  manifest = read_manifest(content, file.path);
  hash = sha256(content);
  for (const auto& [name, entry] : manifest.files) check_size(name, entry);
  for (const auto& [name, entry] : manifest.files) check_content(name, entry);
  refuse_strangers();
  read_prior();
}

std::string Bundle::path(const std::string& name) const { return (fs::path(folder) / name).string(); }

void Bundle::require_unchanged(const std::string& name) const {
  try {
    if (identity_of(path(name)) == identities_.at(name)) return;
  } catch (const Error& error) {
    if (error.status != TARFLOW_BUNDLE) throw;  // else it is gone
  }
  throw bundle_error("'" + path(name) + "' was replaced or changed after its hash was checked; open the bundle again");
}

void Bundle::check_size(const std::string& name, const FileEntry& entry) const {
  require_inside(folder, path(name));
  const std::uint64_t size = identity_of(path(name)).size;
  if (size == entry.size) return;
  throw bundle_error("'" + path(name) + "' has " + text_of(size) + " bytes; the manifest says " + text_of(entry.size) +
                     ": it is truncated or changed. " + kCopyAgain);
}

// The hash, and of a graph what it may do. Golden pairs and the parity card are read by nothing here.
void Bundle::check_content(const std::string& name, const FileEntry& entry) {
  if (name == "golden.safetensors" || name == "PARITY.md") return;
  auto opened = std::make_unique<File>(path(name));
  File& file = *opened;
  const bool graph = manifest.graphs.count(name) == 1;
  if (graph && entry.size > kGraphLimit) {
    throw bundle_error("'" + file.path + "' has " + text_of(entry.size) + " bytes; expected a graph of " +
                       text_of(kGraphLimit) + " at most. " + kCopyAgain);
  }
  const std::string content = graph ? file.read(entry.size) : "";
  const std::string found = graph ? sha256(content) : sha256(file);
  if (found != entry.sha256) {
    throw bundle_error("'" + file.path + "' is damaged or was changed: its SHA-256 is " + found.substr(0, 16) +
                       "..., the manifest says " + entry.sha256.substr(0, 16) + "... " + kCopyAgain);
  }
  if (graph) check_graph(content, file.path, manifest.files.at(kWeights).size, manifest.for_cuda.count(name) == 1);
  identities_.emplace(name, file.identity);
  if (name == kWeights) weights_ = std::move(opened);
}

void Bundle::refuse_strangers() const {
  std::set<std::string> strange;
  std::error_code error;
  const std::vector<fs::path> entries = entries_of(folder, error);
  if (error) throw unreadable(folder, error.value());
  for (const fs::path& entry : entries) {
    const std::string name = entry.filename().string();
    const bool known = name == kManifest || manifest.files.count(name) || is_beside(name);
    if (!known && !fs::is_directory(entry, error)) strange.insert(name);
  }
  if (!strange.empty()) {
    throw bundle_error("'" + folder + "' holds files its manifest does not name, such as '" + *strange.begin() +
                       "'; remove them, or copy the bundle again");
  }
}

void Bundle::read_prior() {
  File file(path(kWeights));
  std::array<unsigned char, 8> length_bytes{};
  const std::size_t read = file.read(reinterpret_cast<char*>(length_bytes.data()), 8);
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | length_bytes[static_cast<std::size_t>(i)];
  const std::uint64_t size = manifest.files.at(kWeights).size;
  if (read < 8 || size < 8 || length > size - 8 || length > kWeightsHeaderLimit) {
    throw bundle_error("'" + file.path + "' is no safetensors file. " + kCopyAgain);
  }
  const WeightsHeader weights = read_weights_header(file.read(length), size - 8 - length, file.path);
  if (!(weights.shape == manifest.shape)) {
    throw bundle_error("'" + folder + "': the manifest describes another model than its weights do. " + kCopyAgain);
  }
  deviation.assign(static_cast<std::size_t>(manifest.shape.numbers()), 1.0F);  // 'var' is as large
  if (manifest.shape.nvp) return require_unchanged(kWeights);
  file.skip_to(8 + length + weights.variance);
  const std::size_t bytes = deviation.size() * sizeof(float);
  const bool whole = file.read(reinterpret_cast<char*>(deviation.data()), bytes) == bytes;
  require_unchanged(kWeights);
  const auto sound = [](float variance) { return std::isfinite(variance) && variance >= 0; };
  if (!whole || !std::all_of(deviation.begin(), deviation.end(), sound)) {
    throw bundle_error("'" + file.path + "': the prior variance 'var' is not finite, or negative. " + kCopyAgain);
  }
  for (float& value : deviation) value = std::sqrt(value);
}

}  // namespace tarflow::internal
