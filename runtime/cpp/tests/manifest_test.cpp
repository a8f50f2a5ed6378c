#include "manifest.hpp"

#include <doctest/doctest.h>

#include "error.hpp"
#include "support.hpp"

using support::Json;
using tarflow::internal::Error;
using tarflow::internal::read_manifest;
using tarflow::internal::read_weights_header;

namespace {

Json demo() { return Json::parse(support::read(support::fs::path(TARFLOW_DEMO) / "manifest.json")); }

std::string refusal(const std::string& content) {
  try {
    read_manifest(content, "manifest.json");
  } catch (const Error& error) {
    CHECK(error.status == TARFLOW_BUNDLE);
    return error.what();
  }
  return "";
}

std::string nested(int levels) {
  return std::string(static_cast<std::size_t>(levels), '[') + std::string(static_cast<std::size_t>(levels), ']');
}

}  // namespace

TEST_CASE("the demo's manifest is read") {
  const auto manifest = read_manifest(demo().dump(), "manifest.json");
  CHECK(manifest.shape.tokens() == 16);
  CHECK(manifest.shape.patch_dim() == 4);
  CHECK(manifest.blocks.size() == 4);
  CHECK(manifest.blocks[1].reversed);
  CHECK(std::string(manifest.precision->name) == "fp32");
}

TEST_CASE("a manifest that is not one is refused with the place") {
  const std::pair<std::function<void(Json&)>, const char*> cases[] = {
      {[](Json& m) { m["format"] = "zip"; }, "expected \"tarflow-bundle\""},
      {[](Json& m) { m["schema"] = 2; }, "schema version 2"},
      {[](Json& m) { m["schema"] = 1.0; }, "schema version 1.0"},
      {[](Json& m) { m["schema"] = true; }, "schema version true"},
      {[](Json& m) { m.erase("blocks"); }, "'blocks' is missing"},
      {[](Json& m) { m["blocks"] = 7; }, "'blocks' is number"},
      {[](Json& m) { m["blocks"].erase(3); }, "3 blocks listed; config says 4"},
      {[](Json& m) { m["blocks"][1]["reversed"] = false; }, "odd blocks are, even not"},
      {[](Json& m) { m["blocks"][2]["graphs"]["step"] = "manifest.json"; }, "not among the files"},
      {[](Json& m) { m["blocks"][2]["graphs"]["resident"] = nullptr; }, "not among the files"},
      {[](Json& m) { m["blocks"][2]["graphs"]["step"] = "weights.safetensors"; }, "expected an .onnx file"},
      {[](Json& m) {
         m["files"]["a/b.onnx"] = m["files"]["weights.safetensors"];
         m["blocks"][2]["graphs"]["step"] = "a/b.onnx";
       },
       "expected an .onnx file beside the weights"},
      {[](Json& m) { m["config"]["channels"] = 0; }, "'channels' is 0"},
      {[](Json& m) { m["config"]["channels"] = true; }, "'channels' is true"},
      {[](Json& m) { m["config"]["width"] = 1e300; }, "'width'"},
      {[](Json& m) { m["config"]["width"] = 18446744073709551615U; }, "'width'"},
      {[](Json& m) { m["config"]["image_size"] = 1 << 16; }, "more than this library takes"},
      {[](Json& m) { m["config"]["patch_size"] = 3; }, "patch_size must divide image_size"},
      {[](Json& m) { m["config"]["noise_std"] = -1; }, "noise_std"},
      {[](Json& m) { m["config"]["noise_std"] = "0.1"; }, "noise_std"},
      {[](Json& m) { m["config"].erase("noise_std"); }, "'noise_std' is missing"},
      {[](Json& m) { m["config"]["nvp"] = 1; }, "'nvp' is number"},
      {[](Json& m) { m["files"].erase("golden.safetensors"); }, "files lacks golden.safetensors"},
      {[](Json& m) { m["files"]["weights.safetensors"]["sha256"] = "ABC"; }, "no SHA-256"},
      {[](Json& m) { m["files"]["weights.safetensors"]["size"] = -1; }, "'size' is -1"},
      {[](Json& m) { m["precision"] = "fp64"; }, "precision"},
      {[](Json& m) { m["exporter"]["torch"] = 2; }, "exporter.torch"},
      {[](Json& m) { m["opset"] = 0; }, "'opset' is 0"},
      {[](Json& m) { m["parity"] = "fine"; }, "'parity'"},
      {[](Json& m) { m["class_names"] = 7; }, "'class_names' is number"},
      {[](Json& m) { m["class_names"] = {"zero", "one"}; }, "class_names has 2 names; config says 10 classes"},
      {[](Json& m) { m["class_names"] = Json(10, 3); }, "class_names[0] is 3; expected text"},
      {[](Json& m) { m["class_names"] = Json(10, ""); }, "class_names[0] is \"\"; expected text"},
      {[](Json& m) { m["class_names"] = Json(10, "a\nb"); }, "without control characters"},
      {[](Json& m) { m["class_names"] = Json(10, "\u0085"); }, "without control characters"},
  };
  for (const auto& [change, words] : cases) {
    Json manifest = demo();
    change(manifest);
    const std::string found = refusal(manifest.dump());
    CAPTURE(words);
    CHECK_MESSAGE(found.find(words) != std::string::npos, found);
    CHECK(!found.empty());
  }
}

TEST_CASE("a name that leads out of the bundle is refused") {
  for (const char* name : {"../x", "/etc/passwd", "a/../../x", "a//b", "a/", "./a", "", "a\\b", "c:x", "..", "a/."}) {
    Json manifest = demo();
    manifest["files"][name] = manifest["files"]["weights.safetensors"];
    CHECK_MESSAGE(refusal(manifest.dump()).find("not a plain relative path") != std::string::npos, name);
  }
  Json manifest = demo();
  manifest["files"][std::string("a\0b", 3)] = manifest["files"]["weights.safetensors"];
  CHECK(refusal(manifest.dump()).find("not a plain relative path") != std::string::npos);
}

TEST_CASE("text that is no JSON, or too deep, is refused") {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[1,2"), std::string("nul"), std::string("{\"a\": NaN}"),
        std::string("\xEF\xBB\xBF{}"), std::string("\xff\xfe"), std::string("{} {}"), std::string("1e999"), nested(65),
        nested(1000000), std::string(1000000, '[')}) {
    CHECK(!refusal(text).empty());
  }
  Json manifest = demo();
  manifest["extra"] = Json::parse(nested(62));
  CHECK(refusal(manifest.dump()).empty());  // 63 levels: unknown keys are left alone
}

TEST_CASE("the weights' header is read, and refused where it lies or claims more than there is") {
  const std::string file = support::read(support::fs::path(TARFLOW_DEMO) / "weights.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  const Json right = Json::parse(file.substr(8, length));
  const std::uint64_t room = file.size() - 8 - length;
  CHECK(read_weights_header(right.dump(), room, "w").variance == right["var"]["data_offsets"][0]);
  const auto refused = [&](const std::function<void(Json&)>& change, const char* words) {
    Json header = right;
    change(header);
    CHECK_THROWS_WITH_AS(read_weights_header(header.dump(), room, "w"), doctest::Contains(words), Error);
  };
  for (const char* name : {"var", "blocks.3.pos_embed", "blocks.0.class_embed"}) {
    refused([&](Json& h) { h.erase(name); }, "is missing");
    refused([&](Json& h) { h[name] = 7; }, "is number");
    for (const Json& offsets : {Json{0, room + 1}, Json{9, 8}, Json{-1, 8}, Json{0}, Json{0, 4}})
      refused([&](Json& h) { h[name]["data_offsets"] = offsets; }, name);
    refused([&](Json& h) { h[name]["dtype"] = "F16"; }, "expected F32");
    refused([&](Json& h) { h[name]["shape"] = {1 << 20, 1 << 20}; }, "expected F32");
  }
  for (const auto& [key, value] : {std::pair{"image_size", 16000}, {"layers", 4}, {"layers", 1 << 20}, {"blocks", 5},
                                   {"blocks", 1 << 24}, {"classes", 1 << 24}, {"width", 1 << 20}}) {
    CAPTURE(key);
    refused(
        [&](Json& h) {
          Json config = Json::parse(h["__metadata__"]["tarflow.config"].get<std::string>());
          config[key] = value;
          h["__metadata__"]["tarflow.config"] = config.dump();
        },
        "blocks.");
  }
  CHECK_THROWS_AS(read_weights_header("{}", 0, "w"), Error);
  CHECK_THROWS_AS(read_weights_header(R"({"__metadata__": {"tarflow.config": "{"}})", 0, "w"), Error);
}
