#include "manifest.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "error.hpp"

namespace tarflow::internal {
namespace {

using Json = nlohmann::json;

constexpr int kDeepest = 64;  // levels; ours has five
constexpr const char* kRebuild = "export it again: tarflow export CHECKPOINT -o BUNDLE --force";
constexpr std::int64_t kLargestSide = 1 << 24;  // of any number of a model: products of a few stay within 64 bits

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

// Typed access to a JSON document that names the place when something is wrong.
struct Reader {
  const std::string& source;

  Error wrong(const std::string& what) const {
    return bundle_error("'" + source + "': " + what + ". It is damaged or was edited; " + kRebuild);
  }

  Json parse(std::string_view content) const {
    const auto limit_depth = [this](int depth, Json::parse_event_t, Json&) {
      if (depth >= kDeepest) throw wrong("it is nested more than " + std::to_string(kDeepest) + " levels deep");
      return true;
    };
    try {
      if (content.substr(0, 3) == "\xEF\xBB\xBF") throw wrong("it begins with a byte order mark");
      return Json::parse(content.begin(), content.end(), limit_depth);
    } catch (const Json::exception& error) {
      throw wrong("it cannot be parsed (" + std::string(error.what()).substr(0, 120) + ")");
    }
  }

  const Json& get(const Json& object, const char* key) const {
    if (!object.is_object()) throw wrong("'" + std::string(key) + "' is asked of what is no object");
    const auto found = object.find(key);
    if (found == object.end()) throw wrong("'" + std::string(key) + "' is missing");
    return *found;
  }

  const Json& object(const Json& parent, const char* key) const {
    const Json& value = get(parent, key);
    if (!value.is_object()) throw wrong("'" + std::string(key) + "' is " + value.type_name() + "; expected an object");
    return value;
  }

  std::string text(const Json& parent, const char* key) const {
    const Json& value = get(parent, key);
    if (!value.is_string()) throw wrong("'" + std::string(key) + "' is " + value.type_name() + "; expected a string");
    return value.get<std::string>();
  }

  bool truth(const Json& parent, const char* key) const {
    const Json& value = get(parent, key);
    if (!value.is_boolean()) throw wrong("'" + std::string(key) + "' is " + value.type_name() + "; expected a boolean");
    return value.get<bool>();
  }

  std::int64_t natural(const Json& value, const std::string& where, std::int64_t least,
                       std::int64_t most = std::numeric_limits<std::int64_t>::max()) const {
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() ||
                       value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()}) &&
                      value.get<std::int64_t>() >= least && value.get<std::int64_t>() <= most;
    if (!fits) throw wrong("'" + where + "' is " + shown(value) + "; expected an integer of " + std::to_string(least) + " or more");
    return value.get<std::int64_t>();
  }

  // A relative path of plain components, with forward slashes, that stays inside the bundle.
  const std::string& confined(const std::string& name) const {
    bool plain = !name.empty() && name.find_first_of(std::string_view("\\:\0", 3)) == std::string::npos;
    for (std::size_t start = 0; plain && start <= name.size();) {
      const std::size_t end = std::min(name.find('/', start), name.size());
      const std::string part = name.substr(start, end - start);
      plain = !part.empty() && part != "." && part != "..";
      start = end + 1;
    }
    if (!plain) {
      throw bundle_error("'" + source + "' names the file " + shown(name) +
                         ", which is not a plain relative path inside the bundle; it was not opened");
    }
    return name;
  }
};

ModelShape read_shape(const Reader& reader, const Json& numbers) {
  const auto natural = [&](const char* key, std::int64_t least) {
    return reader.natural(reader.get(numbers, key), key, least, kLargestSide);
  };
  ModelShape shape{};
  const Json& noise = reader.get(numbers, "noise_std");
  if (!noise.is_null()) {
    const double value = noise.is_number() ? noise.get<double>() : -1.0;
    if (!std::isfinite(value) || value < 0) {
      throw reader.wrong("noise_std is " + shown(noise) + "; expected null or a number of 0 or more");
    }
    shape.noise_std = value;
  }
  shape.image_size = natural("image_size", 1);
  shape.channels = natural("channels", 1);
  shape.patch_size = natural("patch_size", 1);
  shape.width = natural("width", 1);
  shape.blocks = natural("blocks", 1);
  shape.layers = natural("layers", 1);
  shape.classes = natural("classes", 0);
  shape.head_dim = natural("head_dim", 1);
  shape.nvp = reader.truth(numbers, "nvp");
  if (shape.image_size % shape.patch_size != 0 || shape.width % shape.head_dim != 0) {
    throw reader.wrong("config: patch_size must divide image_size, and head_dim must divide width");
  }
  // What one image and one cache row take must be countable; whether they fit is for whoever allocates.
  const double numbers_of_image = double(shape.image_size) * double(shape.image_size) * double(shape.channels);
  const double numbers_of_cache = 2.0 * double(shape.layers) * double(shape.width) * double(shape.tokens());
  if (numbers_of_image > 0x1p40 || numbers_of_cache > 0x1p50) {
    throw reader.wrong("config describes images of " + std::to_string(shape.image_size) + " pixels a side, more than any machine can hold");
  }
  return shape;
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

BlockEntry read_block(const Reader& reader, const Json& block, const Manifest& manifest, std::size_t k) {
  const std::string where = "blocks[" + std::to_string(k) + "]";
  if (!block.is_object()) throw reader.wrong(where + " is " + block.type_name() + "; expected an object");
  const Json& graphs = reader.object(block, "graphs");
  BlockEntry entry{reader.truth(block, "reversed"), {}};
  for (std::size_t kind = 0; kind < kKindNames.size(); ++kind) {
    const auto found = graphs.find(kKindNames[kind]);
    if (found == graphs.end() && kind > kGradient) continue;
    if (found == graphs.end() || !found->is_string() || !manifest.files.count(found->get<std::string>())) {
      throw reader.wrong(where + ".graphs." + kKindNames[kind] + " is " +
                         (found == graphs.end() ? "missing" : shown(*found)) + ", which is not among the files");
    }
    entry.graphs[kind] = found->get<std::string>();
  }
  if (entry.reversed != (k % 2 == 1)) {
    throw reader.wrong(where + ".reversed is " + (entry.reversed ? "true" : "false") +
                       "; in schema 1 odd blocks are, even not");
  }
  return entry;
}

}  // namespace

bool operator==(const ModelShape& a, const ModelShape& b) {
  return a.image_size == b.image_size && a.channels == b.channels && a.patch_size == b.patch_size &&
         a.width == b.width && a.blocks == b.blocks && a.layers == b.layers && a.classes == b.classes &&
         a.head_dim == b.head_dim && a.nvp == b.nvp && a.noise_std == b.noise_std;
}

Manifest read_manifest(std::string_view content, const std::string& source) {
  const Reader reader{source};
  const Json document = reader.parse(content);
  if (!document.is_object()) throw reader.wrong("the document is " + std::string(document.type_name()) + "; expected an object");
  const Json format = document.value("format", Json());
  if (format != "tarflow-bundle") {
    throw bundle_error("'" + source + "' says format " + shown(format) + "; expected \"tarflow-bundle\": this is no bundle");
  }
  const Json schema = document.value("schema", Json());
  if (!schema.is_number_integer() || schema != 1) {
    throw bundle_error("'" + source + "' has schema version " + shown(schema) +
                       "; this tarflow reads version 1. Install the tarflow that wrote it, or " + kRebuild);
  }
  Manifest manifest{reader.text(document, "name"), reader.text(document, "precision"),
                    read_shape(reader, reader.object(document, "config")), {}, {}};
  for (const auto& [name, entry] : reader.object(document, "files").items()) {
    reader.confined(name);
    const std::string hash = reader.text(entry, "sha256");
    if (!is_sha256(hash)) throw reader.wrong("'" + hash.substr(0, 70) + "' is no SHA-256 in lower-case hexadecimal");
    const std::int64_t size = reader.natural(reader.get(entry, "size"), "size", 0);
    manifest.files[name] = {hash, static_cast<std::uint64_t>(size)};
  }
  const Json& blocks = reader.get(document, "blocks");
  if (!blocks.is_array()) throw reader.wrong(std::string("'blocks' is ") + blocks.type_name() + "; expected an array");
  for (const Json& block : blocks) manifest.blocks.push_back(read_block(reader, block, manifest, manifest.blocks.size()));
  if (static_cast<std::int64_t>(manifest.blocks.size()) != manifest.shape.blocks) {
    throw reader.wrong(std::to_string(manifest.blocks.size()) + " blocks listed; config says " +
                       std::to_string(manifest.shape.blocks));
  }
  for (const char* name : {kWeights, "golden.safetensors"}) {
    if (!manifest.files.count(name)) throw reader.wrong("files lacks " + std::string(name));
  }
  if (manifest.precision != "fp32" && manifest.precision != "fp16" && manifest.precision != "bf16") {
    throw reader.wrong("precision is " + shown(manifest.precision) + "; expected one of fp32, fp16, bf16");
  }
  reader.natural(reader.get(document, "opset"), "opset", 1);
  reader.object(document, "parity");
  for (const auto& [package, version] : reader.object(document, "exporter").items()) {
    if (!version.is_string()) throw reader.wrong("exporter." + package + " is " + version.type_name() + "; expected a string");
  }
  return manifest;
}

WeightsHeader read_weights_header(std::string_view content, std::uint64_t room, const std::string& source) {
  const Reader reader{source};
  const Json document = reader.parse(content);
  const std::string config = reader.text(reader.object(document, "__metadata__"), "tarflow.config");
  WeightsHeader header{read_shape(reader, reader.parse(config)), std::nullopt};
  const auto found = document.find("var");
  if (found == document.end()) return header;
  WeightsHeader::Tensor tensor{reader.text(*found, "dtype"), {}, 0, 0};
  const Json& shape = reader.get(*found, "shape");
  const Json& offsets = reader.get(*found, "data_offsets");
  if (!shape.is_array() || !offsets.is_array() || offsets.size() != 2) {
    throw reader.wrong("tensor 'var' has no shape, or no two data_offsets");
  }
  for (const Json& size : shape) tensor.shape.push_back(reader.natural(size, "var.shape", 0));
  tensor.begin = static_cast<std::uint64_t>(reader.natural(offsets[0], "var.data_offsets", 0));
  tensor.end = static_cast<std::uint64_t>(reader.natural(offsets[1], "var.data_offsets", 0));
  if (tensor.begin > tensor.end || tensor.end > room) throw reader.wrong("tensor 'var' lies outside the file");
  header.variance = tensor;
  return header;
}

}  // namespace tarflow::internal
