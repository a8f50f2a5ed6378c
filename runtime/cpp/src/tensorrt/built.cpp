#include "tensorrt/built.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "error.hpp"

namespace tarflow::internal {
namespace {

namespace fs = std::filesystem;

constexpr std::uintmax_t kRecordLimit = std::uintmax_t{16} << 20;  // bytes; kilobytes are normal

Record read(const fs::path& path) {
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error || size > kRecordLimit) throw bundle_error("'" + path.string() + "' is no record: unreadable or too large");
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  return read_record(content, path.string());
}

}  // namespace

Built choose_built(const Bundle& bundle, const Here& here) {
  std::vector<fs::path> folders;
  std::error_code error;
  for (const fs::path& entry : entries_of(bundle.path("engines"), error)) {
    if (fs::exists(fs::symlink_status(entry / "engines.json", error))) folders.push_back(entry);
  }
  if (folders.empty()) {
    throw bundle_error("'" + bundle.folder + "' has no TensorRT engines; build engines on this machine");
  }
  std::sort(folders.begin(), folders.end());
  std::string reasons;
  for (const fs::path& folder : folders) {
    reasons += "\n  " + folder.filename().string() + ": ";
    try {
      Record record = read(folder / "engines.json");
      const std::string wrong = record.misfit(bundle.hash, bundle.manifest.blocks.size(), here);
      if (wrong.empty()) return {folder.string(), std::move(record)};
      reasons += wrong;
    } catch (const Error& damaged) {
      reasons += damaged.what();
    }
  }
  throw bundle_error("no engines of '" + bundle.folder + "' run on this machine:" + reasons +
                     "\nBuild engines on this machine");
}

}  // namespace tarflow::internal
