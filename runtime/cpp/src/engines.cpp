#include "engines.hpp"

#include <algorithm>
#include <sstream>

#include "json_reader.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 24;  // of any size in a profile
constexpr const char* kKinds[] = {"step", "forward", "gradient"};

std::array<std::int64_t, 3> read_range(const JsonReader& reader, const Json& profile, const char* key) {
  const Json& numbers = reader.array(profile, key);
  std::array<std::int64_t, 3> range{};
  if (numbers.size() != range.size())
    throw reader.wrong(std::string("'") + key + "' is " + shown(numbers) + "; expected three numbers");
  for (std::size_t i = 0; i < range.size(); ++i)
    range[i] = reader.natural(numbers[i], key, i == 0 ? 1 : range[i - 1], kMost);
  return range;
}

// "11.4.0.12" -> "11.4.0": what a library says of itself.
std::string release(const std::string& version) {
  std::size_t end = 0;
  for (int dots = 0; end < version.size() && (version[end] != '.' || ++dots < 3);) ++end;
  return version.substr(0, end);
}

}  // namespace

std::string Record::file(std::size_t block, const std::string& kind) const {
  for (const auto& [name, engine] : engines) {
    if (engine.block == static_cast<std::int64_t>(block) && engine.kind == kind) return name;
  }
  return "";
}

std::string Record::misfit(const std::string& bundle_hash, std::size_t blocks, const Here& here) const {
  if (bundle != bundle_hash)
    return "they were built from another bundle (" + bundle.substr(0, 12) + ", this one is " +
           bundle_hash.substr(0, 12) + ")";
  for (std::size_t block = 0; block < blocks; ++block) {
    for (const char* kind : kKinds) {
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

std::string Record::rebuild(const std::string& folder, const Here& here) const {
  const auto joined = [](const auto& parts) {
    std::ostringstream text;
    for (std::size_t i = 0; i < parts.size(); ++i) text << (i > 0 ? "," : "") << parts[i];
    return text.str();
  };
  std::string command = "tarflow build '" + folder + "'";
  for (const char* known : {"fp32", "fp16", "bf16"}) {  // no other text of a file's goes into what people type
    if (precision == known) command += " --engine " + precision;
  }
  const auto steps = profiles.find("step");
  if (steps != profiles.end() && !steps->second.empty()) {
    command += " --batch " + joined(steps->second.front().batch);
    if (steps->second.back().window[2] > 1) command += " --window " + joined(steps->second.back().window);
  }
  const bool served = std::find(capabilities.begin(), capabilities.end(), here.capability) != capabilities.end();
  const bool plain = std::all_of(capabilities.begin(), capabilities.end(), [](const std::string& capability) {
    return capability.find_first_not_of("0123456789.") == std::string::npos;
  });
  if (gpu.empty() && served && plain) command += " --device " + joined(capabilities);
  return command;
}

Record read_record(std::string_view content, const std::string& source) {
  const JsonReader reader(source, "remove its folder and build again: tarflow build BUNDLE");
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
  Record record{reader.sha256(document, "bundle"),
                reader.text(document, "precision"),
                reader.text(document, "package"),
                reader.text(document, "version"),
                "",
                {},
                {},
                {}};
  const Json& target = reader.object(document, "target");
  if (!reader.get(target, "gpu").is_null()) record.gpu = reader.text(target, "gpu");
  for (const Json& capability : reader.array(target, "capabilities")) {
    if (!capability.is_string()) throw reader.wrong("capability " + shown(capability) + " is no string");
    record.capabilities.push_back(capability.get<std::string>());
  }
  const Json& profiles = reader.object(document, "profiles");
  for (const char* kind : kKinds) {
    for (const Json& profile : reader.array(profiles, kind)) {
      record.profiles[kind].push_back({reader.natural(reader.get(profile, "branches"), "branches", 1, 2),
                                       read_range(reader, profile, "batch"), read_range(reader, profile, "window")});
    }
    if (record.profiles[kind].empty()) throw reader.wrong(std::string("profiles.") + kind + " is empty");
  }
  for (const auto& [name, entry] : reader.object(document, "engines").items()) {
    const std::string ending = ".engine";
    const bool plain = name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos &&
                       name.size() > ending.size() &&
                       name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
    if (!plain) throw reader.wrong(shown(name) + " is no engine's name");
    record.engines[name] = {reader.natural(reader.get(entry, "block"), "block", 0), reader.text(entry, "kind"),
                            reader.sha256(entry, "sha256"), reader.natural(reader.get(entry, "size"), "size", 0)};
  }
  return record;
}

}  // namespace tarflow::internal
