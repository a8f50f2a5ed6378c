#include "tensorrt/record.hpp"

#include <algorithm>

#include "json_reader.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 24;  // of any size in a profile

std::array<std::int64_t, 3> read_range(const JsonReader& reader, const Json& profile, const char* key) {
  const Json& numbers = reader.array(profile, key);
  std::array<std::int64_t, 3> range{};
  if (numbers.size() != range.size())
    throw reader.wrong(std::string("'") + key + "' is " + shown(numbers) + "; expected three numbers");
  for (std::size_t i = 0; i < range.size(); ++i)
    range[i] = reader.natural(numbers[i], key, i == 0 ? 1 : range[i - 1], kMost);
  return range;
}

std::vector<Profile> read_profiles(const JsonReader& reader, const Json& profiles, Kind kind) {
  std::vector<Profile> found;
  for (const Json& profile : reader.array(profiles, kKindNames[kind])) {
    found.push_back({reader.natural(reader.get(profile, "branches"), "branches", 1, 2),
                     read_range(reader, profile, "batch"), read_range(reader, profile, "window")});
  }
  if (found.empty()) throw reader.wrong(std::string("profiles.") + kKindNames[kind] + " is empty");
  return found;
}

// An engine's file lies beside the record, nowhere else.
void require_file_name(const JsonReader& reader, const std::string& name) {
  const std::string ending = ".engine";
  const bool plain = name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos &&
                     name.size() > ending.size() &&
                     name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
  if (!plain) throw reader.wrong(shown(name) + " is no engine's name");
}

// "11.4.0.12" -> "11.4.0": what a library says of itself.
std::string release(const std::string& version) {
  std::size_t end = 0;
  for (int dots = 0; end < version.size() && (version[end] != '.' || ++dots < 3);) ++end;
  return version.substr(0, end);
}

}  // namespace

std::string Record::file(std::size_t block, Kind kind) const {
  for (const auto& [name, engine] : engines) {
    if (engine.block == static_cast<std::int64_t>(block) && engine.kind == kKindNames[kind]) return name;
  }
  return "";
}

std::string Record::misfit(const std::string& bundle_hash, std::size_t blocks, const Here& here) const {
  if (bundle != bundle_hash)
    return "they were built from another bundle (" + bundle.substr(0, 12) + ", this one is " +
           bundle_hash.substr(0, 12) + ")";
  for (std::size_t block = 0; block < blocks; ++block) {
    for (const Kind kind : kEngineKinds) {
      if (file(block, kind).empty()) return "the build was not finished";
    }
  }
  if (package != here.package || release(version) != release(here.version)) {
    return "they need " + package + " " + version + " exactly, here is " + here.package + " " + here.version;
  }
  if (std::find(capabilities.begin(), capabilities.end(), here.capability) == capabilities.end() ||
      (!gpu.empty() && gpu != here.gpu)) {
    return "they are for " + (gpu.empty() ? "another compute capability" : gpu) + ", here is " + here.gpu + " (" +
           here.capability + ")";
  }
  return "";
}

Record read_record(std::string_view content, const std::string& source) {
  const JsonReader reader(source, "remove its folder and build the engines again");
  const Json document = reader.parse(content);
  if (reader.text(document, "format") != "tarflow-engines" ||
      reader.natural(reader.get(document, "schema"), "schema", 1) != 1) {
    throw reader.wrong("it is no record of engines, or of another version");
  }
  for (const char* gone : {"version_compatible", "strip_weights"}) {  // ways to build that are no more
    if (reader.truth(document, gone)) {
      throw reader.wrong(std::string("'") + gone +
                         "' is true, which this version neither builds nor runs; expected false");
    }
  }
  const std::string precision = reader.text(document, "precision");
  Record record{reader.sha256(document, "bundle"),
                find_precision(precision),
                reader.text(document, "package"),
                reader.text(document, "version"),
                "",
                {},
                {},
                {}};
  if (record.precision == nullptr || record.precision->tensorrt < 0) {
    throw reader.wrong("'precision' is " + shown(precision) + "; expected one of fp32, fp16, bf16");
  }
  const Json& target = reader.object(document, "target");
  if (!reader.get(target, "gpu").is_null()) record.gpu = reader.text(target, "gpu");
  for (const Json& capability : reader.array(target, "capabilities")) {
    if (!capability.is_string()) throw reader.wrong("capability " + shown(capability) + " is no string");
    record.capabilities.push_back(capability.get<std::string>());
  }
  const Json& profiles = reader.object(document, "profiles");
  for (const Kind kind : kEngineKinds) record.profiles[kind] = read_profiles(reader, profiles, kind);
  for (const auto& [name, entry] : reader.object(document, "engines").items()) {
    require_file_name(reader, name);
    record.engines[name] = {reader.natural(reader.get(entry, "block"), "block", 0), reader.text(entry, "kind"),
                            reader.sha256(entry, "sha256"), reader.natural(reader.get(entry, "size"), "size", 0)};
  }
  return record;
}

}  // namespace tarflow::internal
