#include "tensorrt/record.hpp"

#include "error.hpp"
#include "support.hpp"
#include "tensorrt/built.hpp"

using support::Json;
using tarflow::internal::Bundle;
using tarflow::internal::choose_built;
using tarflow::internal::Here;
using tarflow::internal::read_record;
using tarflow::internal::Record;

namespace {

Json document() {
  const Json profile = {{"branches", 1}, {"batch", {1, 2, 4}}, {"window", {1, 1, 1}}};
  Json engines;
  for (const char* kind : {"step", "forward", "gradient"}) {
    engines[std::string("block_00.") + kind + ".engine"] = {
        {"block", 0}, {"kind", kind}, {"sha256", std::string(64, 'b')}, {"size", 5}};
  }
  return {{"format", "tarflow-engines"},
          {"schema", 1},
          {"bundle", std::string(64, 'a')},
          {"precision", "fp16"},
          {"package", "tensorrt"},
          {"version", "11.4.0.12"},
          {"version_compatible", false},
          {"strip_weights", false},
          {"target", {{"gpu", "NVIDIA H200"}, {"capabilities", {"9.0"}}}},
          {"profiles", {{"step", {profile}}, {"forward", {profile}}, {"gradient", {profile}}}},
          {"engines", engines}};
}

}  // namespace

TEST_CASE("engines that fit are told from those that do not, with the reason") {
  const Record record = read_record(document().dump(), "engines.json");
  const std::string bundle(64, 'a');
  const Here here{"tensorrt", "11.4.0", "NVIDIA H200", "9.0"};
  CHECK(record.misfit(bundle, 1, here).empty());
  CHECK(record.misfit(std::string(64, 'c'), 1, here).find("another bundle") != std::string::npos);
  CHECK(record.misfit(bundle, 2, here).find("not finished") != std::string::npos);
  CHECK(record.misfit(bundle, 1, {"tensorrt", "11.5.0", "NVIDIA H200", "9.0"})
            .find("need tensorrt 11.4.0.12 exactly, here is tensorrt 11.5.0") != std::string::npos);
  CHECK(record.misfit(bundle, 1, {"tensorrt", "11.4.0", "NVIDIA L4", "8.9"})
            .find("for NVIDIA H200, here is NVIDIA L4 (8.9)") != std::string::npos);
  CHECK(record.misfit(bundle, 1, {"tensorrt", "11.4.0", "NVIDIA H100", "9.0"}).find("here is NVIDIA H100") !=
        std::string::npos);
}

TEST_CASE("one damaged record keeps no good engines from running, and is named if there are none") {
  namespace fs = std::filesystem;
  const support::Copy copy;
  const Bundle bundle(copy.folder.string());
  const Here here{"tensorrt", "11.4.0", "NVIDIA H200", "9.0"};
  Json good = document();
  good["bundle"] = bundle.hash;
  good["engines"] = Json::object();
  for (std::size_t block = 0; block < bundle.manifest.blocks.size(); ++block) {
    for (const char* kind : {"step", "forward", "gradient"}) {
      good["engines"][std::to_string(block) + kind + ".engine"] = {
          {"block", block}, {"kind", kind}, {"sha256", std::string(64, 'b')}, {"size", 5}};
    }
  }
  const auto put = [&](const char* name, const std::string& content) {
    fs::create_directories(copy.folder / "engines" / name);
    support::write(copy.folder / "engines" / name / "engines.json", content);
  };
  CHECK_THROWS_WITH_AS(choose_built(bundle, here), doctest::Contains("has no TensorRT engines"),
                       tarflow::internal::Error);
  put("a", "{\"format\": ");
  put("b", std::string(1000, '['));
  fs::create_directories(copy.folder / "engines" / "c" / "engines.json");
  put("d", good.dump());
  CHECK(fs::path(choose_built(bundle, here).folder).filename() == "d");
  try {
    choose_built(bundle, {"tensorrt", "11.5.0", "NVIDIA H200", "9.0"});
    FAIL("engines of another version were chosen");
  } catch (const tarflow::internal::Error& error) {
    const std::string said = error.what();
    for (const char* words : {"a: ", "cannot be parsed", "b: ", "levels deep", "c: ", "no record",
                              "d: they need tensorrt", "\nBuild engines on this machine"}) {
      CHECK_MESSAGE(said.find(words) != std::string::npos, said);
    }
  }
}

TEST_CASE("a record that is not one is refused") {
  const auto refused = [](const std::function<void(Json&)>& change, const char* words = "engines.json") {
    Json record = document();
    change(record);
    CHECK_THROWS_WITH_AS(read_record(record.dump(), "engines.json"), doctest::Contains(words),
                         tarflow::internal::Error);
  };
  refused([](Json& r) { r["schema"] = 2; });
  refused([](Json& r) { r["bundle"] = "abc"; });
  for (const char* precision : {"int8", "fp64"}) {
    refused([&](Json& r) { r["precision"] = precision; }, "expected one of fp32, fp16, bf16");
  }
  refused([](Json& r) { r["engines"]["../x.engine"] = r["engines"]["block_00.step.engine"]; });
  refused([](Json& r) { r["engines"]["x.dll"] = r["engines"]["block_00.step.engine"]; });
  refused([](Json& r) { r["profiles"]["step"] = Json::array(); });
  refused([](Json& r) { r["profiles"]["step"][0]["batch"] = {4, 2, 1}; });
  refused([](Json& r) { r["profiles"]["step"][0]["batch"] = {1, 2}; });
  refused([](Json& r) { r["target"]["capabilities"] = {9}; });
  for (const char* gone : {"version_compatible", "strip_weights"}) {
    refused([&](Json& r) { r.erase(gone); });
    refused([&](Json& r) { r[gone] = true; }, gone);
  }
}
