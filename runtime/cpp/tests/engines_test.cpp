#include "engines.hpp"

#include "error.hpp"
#include "support.hpp"

using support::Json;
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

TEST_CASE("a record that is not one is refused") {
  const auto refused = [](const std::function<void(Json&)>& change) {
    Json record = document();
    change(record);
    CHECK_THROWS_AS(read_record(record.dump(), "engines.json"), tarflow::internal::Error);
  };
  refused([](Json& r) { r["schema"] = 2; });
  refused([](Json& r) { r["bundle"] = "abc"; });
  refused([](Json& r) { r["engines"]["../x.engine"] = r["engines"]["block_00.step.engine"]; });
  refused([](Json& r) { r["engines"]["x.dll"] = r["engines"]["block_00.step.engine"]; });
  refused([](Json& r) { r["profiles"]["step"] = Json::array(); });
  refused([](Json& r) { r["profiles"]["step"][0]["batch"] = {4, 2, 1}; });
  refused([](Json& r) { r["profiles"]["step"][0]["batch"] = {1, 2}; });
  refused([](Json& r) { r["target"]["capabilities"] = {9}; });
  refused([](Json& r) { r.erase("strip_weights"); });
}
