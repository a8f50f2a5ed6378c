#include "manifest.hpp"

#include <algorithm>
#include <cmath>

#include "json_reader.hpp"

namespace tarflow::internal {
namespace {

constexpr const char* kAgain = "copy the bundle again, or export it again";
constexpr std::int64_t kLargestSide = 1 << 24;  // of any number of a model: products of a few stay within 64 bits

JsonReader reader_of(const std::string& source) { return {source, kAgain}; }

// A relative path of plain components, with forward slashes, that stays inside the bundle.
void require_confined(const JsonReader& reader, const std::string& name) {
  bool plain = !name.empty() && name.find_first_of(std::string_view("\\:\0", 3)) == std::string::npos;
  for (std::size_t start = 0; plain && start <= name.size();) {
    const std::size_t end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    plain = !part.empty() && part != "." && part != "..";
    start = end + 1;
  }
  if (!plain) {
    throw bundle_error("'" + reader.source() + "' names the file " + shown(name) +
                       ", which is not a plain relative path inside the bundle; it was not opened");
  }
}

ModelShape read_shape(const JsonReader& reader, const Json& numbers) {
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
  if (numbers_of_image > 0x1p30 || numbers_of_cache > 0x1p50) {
    throw reader.wrong("config describes images of " + std::to_string(shape.image_size) +
                       " pixels a side, more than this library takes");
  }
  return shape;
}

// What the classes are called, which goes to terminals and pages: without control characters, C1's, in UTF-8, too.
std::vector<std::string> read_class_names(const JsonReader& reader, const Json& document, std::int64_t classes) {
  std::vector<std::string> names;
  if (!document.contains("class_names")) return names;
  const Json& list = reader.array(document, "class_names");
  if (static_cast<std::int64_t>(list.size()) != classes) {
    throw reader.wrong("class_names has " + text_of(list.size()) + " names; config says " + text_of(classes) +
                       " classes");
  }
  for (const Json& name : list) {
    const std::string text = name.is_string() ? name.get<std::string>() : std::string();
    bool printable = !text.empty();
    for (std::size_t i = 0; i < text.size(); ++i) {
      const auto byte = [&](std::size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
      printable &= byte(i) >= 0x20 && byte(i) != 0x7f && !(byte(i) == 0xc2 && byte(i + 1) < 0xa0);
    }
    if (!printable) {
      throw reader.wrong("class_names[" + text_of(names.size()) + "] is " + shown(name) +
                         "; expected text without control characters");
    }
    names.push_back(text);
  }
  return names;
}

BlockEntry read_block(const JsonReader& reader, const Json& block, const Manifest& manifest, std::size_t k) {
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
    const std::string name = found->get<std::string>();
    const bool is_onnx = name.size() >= 5 && name.compare(name.size() - 5, 5, ".onnx") == 0;
    if (!is_onnx || name.find('/') != std::string::npos) {  // by other names ONNX Runtime takes it for something else
      throw reader.wrong(where + ".graphs." + kKindNames[kind] + " is " + shown(*found) +
                         "; expected an .onnx file beside the weights");
    }
    entry.graphs[kind] = name;
  }
  if (entry.reversed != (k % 2 == 1)) {
    throw reader.wrong(where + ".reversed is " + (entry.reversed ? "true" : "false") +
                       "; in schema 1 odd blocks are, even not");
  }
  return entry;
}

// The tensors that the header of a safetensors file lists, `room` bytes of them.
struct Tensors {
  const JsonReader& reader;
  const Json& document;
  const std::uint64_t room;

  // Where a tensor of float32 begins, which must have this shape.
  std::uint64_t require(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const Json& tensor = reader.object(document, name.c_str());
    std::uint64_t bytes = sizeof(float);
    for (const std::int64_t size : shape) bytes *= static_cast<std::uint64_t>(size);  // read_shape keeps it countable
    if (reader.text(tensor, "dtype") != "F32" || reader.array(tensor, "shape") != Json(shape)) {
      throw reader.wrong("tensor '" + name + "' is " + shown(tensor) + "; expected F32 " + shown(Json(shape)) +
                         " of the model that it describes");
    }
    const Json& offsets = reader.array(tensor, "data_offsets");
    if (offsets.size() != 2) throw reader.wrong("tensor '" + name + "' has no two data_offsets");
    const auto begin = static_cast<std::uint64_t>(reader.natural(offsets[0], name + ".data_offsets", 0));
    const auto end = static_cast<std::uint64_t>(reader.natural(offsets[1], name + ".data_offsets", 0));
    if (end > room || begin > end || end - begin != bytes) {
      throw reader.wrong("tensor '" + name + "' of " + text_of(bytes) + " bytes lies outside the file");
    }
    return begin;
  }
};

// Whether a parity card has a row for native decoding in int8, within tolerance. Nothing else of it is read.
bool vouched_int8(const Json& card) {
  const auto number = [&card](const std::string& name, double otherwise) {
    return card.value(Json::json_pointer("/native/int8/" + name), otherwise);
  };
  try {  // a card of a large model has no round trip of a sample
    return number("rms", HUGE_VAL) <= number("tolerance/rms", 0) &&
           number("certificate", 0) <= number("tolerance/certificate", -1);
  } catch (const Json::exception&) {  // something else is there
    return false;
  }
}

}  // namespace

bool operator==(const ModelShape& a, const ModelShape& b) {
  return a.image_size == b.image_size && a.channels == b.channels && a.patch_size == b.patch_size &&
         a.width == b.width && a.blocks == b.blocks && a.layers == b.layers && a.classes == b.classes &&
         a.head_dim == b.head_dim && a.nvp == b.nvp && a.noise_std == b.noise_std;
}

Manifest read_manifest(std::string_view content, const std::string& source) {
  const JsonReader reader = reader_of(source);
  const Json document = reader.parse(content);
  if (!document.is_object())
    throw reader.wrong("the document is " + std::string(document.type_name()) + "; expected an object");
  const Json format = document.value("format", Json());
  if (format != "tarflow-bundle") {
    throw bundle_error("'" + source + "' says format " + shown(format) +
                       "; expected \"tarflow-bundle\": this is no bundle");
  }
  const Json schema = document.value("schema", Json());
  if (!schema.is_number_integer() || schema != 1) {
    throw bundle_error("'" + source + "' has schema version " + shown(schema) +
                       "; this tarflow reads version 1. Install the tarflow that wrote it, or export it again");
  }
  Manifest manifest{
      reader.text(document, "name"), nullptr, read_shape(reader, reader.object(document, "config")), {}, {}, {}, {}, {}};
  manifest.class_names = read_class_names(reader, document, manifest.shape.classes);
  for (const auto& [name, entry] : reader.object(document, "files").items()) {
    require_confined(reader, name);
    const std::string hash = reader.sha256(entry, "sha256");
    const std::int64_t size = reader.natural(reader.get(entry, "size"), "size", 0);
    manifest.files[name] = {hash, static_cast<std::uint64_t>(size)};
  }
  for (const Json& block : reader.array(document, "blocks"))
    manifest.blocks.push_back(read_block(reader, block, manifest, manifest.blocks.size()));
  if (static_cast<std::int64_t>(manifest.blocks.size()) != manifest.shape.blocks) {
    throw reader.wrong(std::to_string(manifest.blocks.size()) + " blocks listed; config says " +
                       std::to_string(manifest.shape.blocks));
  }
  for (const BlockEntry& block : manifest.blocks) manifest.graphs.insert(block.graphs.begin(), block.graphs.end());
  manifest.graphs.erase("");
  manifest.for_cuda = manifest.graphs;
  for (const BlockEntry& block : manifest.blocks) {
    for (std::size_t kind = 0; kind < kCuda; ++kind) manifest.for_cuda.erase(block.graphs[kind]);
  }
  for (const char* name : {kWeights, "golden.safetensors"}) {
    if (!manifest.files.count(name)) throw reader.wrong("files lacks " + std::string(name));
  }
  manifest.precision = find_precision(reader.text(document, "precision"));
  if (manifest.precision == nullptr) {
    throw reader.wrong("precision is " + shown(document["precision"]) + "; expected one of fp32, fp16, bf16, int8");
  }
  reader.natural(reader.get(document, "opset"), "opset", 1);
  manifest.vouched_int8 = vouched_int8(reader.object(document, "parity"));
  for (const auto& [package, version] : reader.object(document, "exporter").items()) {
    if (!version.is_string())
      throw reader.wrong("exporter." + package + " is " + version.type_name() + "; expected a string");
  }
  return manifest;
}

WeightsHeader read_weights_header(std::string_view content, std::uint64_t room, const std::string& source) {
  const JsonReader reader = reader_of(source);
  const Json document = reader.parse(content);
  const std::string config = reader.text(reader.object(document, "__metadata__"), "tarflow.config");
  const ModelShape shape = read_shape(reader, reader.parse(config));
  const Tensors tensors{reader, document, room};
  for (std::int64_t k = 0; k < shape.blocks; ++k) {
    const std::string block = "blocks." + text_of(k) + ".", layers = block + "attn_blocks.";
    tensors.require(block + "pos_embed", {shape.tokens(), shape.width});
    if (shape.classes > 0) tensors.require(block + "class_embed", {shape.classes, 1, shape.width});
    tensors.require(layers + text_of(shape.layers - 1) + ".attention.norm.weight", {shape.width});
  }
  return {shape, tensors.require("var", {shape.tokens(), shape.patch_dim()})};
}

}  // namespace tarflow::internal
