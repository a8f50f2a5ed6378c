// Bad input of every kind: a status and a message, never a crash.
#include "bundle.hpp"

#include <sys/resource.h>

#include "support.hpp"

using support::Copy;
using support::failure;
using support::Json;
namespace fs = std::filesystem;

namespace {

support::Failure opening(const fs::path& folder) {
  return failure([&] { tarflow::Flow flow(folder.string()); });
}

// ONNX Runtime, which decodes by graphs.
tarflow::OpenOptions graphs() {
  tarflow::OpenOptions options;
  options.provider = "cpu";
  return options;
}

}  // namespace

TEST_CASE("what is no bundle is refused with what would help") {
  const Copy copy;
  const auto missing = opening(copy.root / "nothing");
  CHECK(missing.status == TARFLOW_BUNDLE);
  CHECK(missing.says("; export one"));
  const auto file = opening(copy.folder / "manifest.json");
  CHECK(file.status == TARFLOW_BUNDLE);
  CHECK(file.says("is a file; expected a bundle, a folder with manifest.json"));
  fs::remove(copy.folder / "manifest.json");
  CHECK(opening(copy.folder).says("has no manifest.json"));
  support::write(copy.folder / "manifest.json", std::string((16 << 20) + 1, ' '));
  CHECK(opening(copy.folder).says("larger than 16 MiB"));
}

TEST_CASE("every file that is truncated, longer, flipped or missing is named") {
  for (const char* name : {"weights.safetensors", "block_00.step.onnx", "block_03.gradient.onnx"}) {
    const Copy copy;
    const fs::path path = copy.folder / name;
    const std::string content = support::read(path);
    support::write(path, content.substr(0, content.size() / 2));
    CHECK(opening(copy.folder).says("truncated or changed"));
    support::write(path, content + "x");
    CHECK(opening(copy.folder).says("truncated or changed"));
    std::string flipped = content;
    flipped[content.size() / 3] = static_cast<char>(flipped[content.size() / 3] ^ 4);
    support::write(path, flipped);
    const auto damaged = opening(copy.folder);
    CHECK(damaged.status == TARFLOW_BUNDLE);
    CHECK(damaged.says(name));
    CHECK(damaged.says("SHA-256"));
    fs::remove(path);
    CHECK(opening(copy.folder).says("is missing"));
    fs::create_directory(path);
    CHECK(opening(copy.folder).status == TARFLOW_BUNDLE);
  }
}

TEST_CASE("the manifest cut at any length is refused") {
  const Copy copy;
  const std::string content = support::read(copy.folder / "manifest.json");
  for (std::size_t length = 0; length + 2 < content.size(); length += 997) {
    support::write(copy.folder / "manifest.json", content.substr(0, length));
    CHECK(opening(copy.folder).status == TARFLOW_BUNDLE);
  }
}

TEST_CASE("links that lead out of the bundle, and strangers inside it, are refused") {
  const Copy copy;
  const fs::path weights = copy.folder / "weights.safetensors", outside = copy.root / "outside";
  fs::rename(weights, outside);
  fs::create_symlink(outside, weights);
  CHECK(opening(copy.folder).says("leads out of the bundle"));
  fs::remove(weights);
  fs::rename(outside, weights);
  support::write(copy.folder / "stranger.bin", "x");
  CHECK(opening(copy.folder).says("'stranger.bin'"));
  fs::remove(copy.folder / "stranger.bin");
  fs::create_directory(copy.folder / "engines");  // folders are not read
  CHECK_NOTHROW(tarflow::Flow(copy.folder.string()));
  fs::create_directory_symlink(copy.folder, copy.root / "link");
  CHECK_NOTHROW(tarflow::Flow((copy.root / "link").string()));
}

TEST_CASE("a folder as a hub's cache lays it out is a bundle, with what lies beside the files") {
  const Copy copy;
  const fs::path cache = copy.root / "models--a--b", blobs = cache / "blobs", at = cache / "snapshots" / "1a2b" / "demo";
  fs::create_directories(blobs);
  fs::create_directories(at);
  for (const auto& file : fs::directory_iterator(copy.folder)) {
    fs::rename(file.path(), blobs / file.path().filename());
    fs::create_symlink(fs::path("../../../blobs") / file.path().filename(), at / file.path().filename());
  }
  for (const char* name : {".gitattributes", "README.md", "LICENSE", ".DS_Store", ".nfs0001"}) support::write(at / name, "x");
  CHECK_NOTHROW(tarflow::Flow(at.string()).sample({1}));
  fs::remove(at / "weights.safetensors");
  fs::rename(blobs / "weights.safetensors", cache / "weights.safetensors");  // beside the blobs is outside
  fs::create_symlink("../../../weights.safetensors", at / "weights.safetensors");
  CHECK(opening(at).says("leads out of the bundle"));
}

TEST_CASE("a bundle that is replaced while it is open is never mixed with the other") {
  const Copy copy, other;
  tarflow::Flow flow(copy.folder.string(), graphs());
  const std::vector<float> before = flow.sample({1});
  CHECK(flow.sample({1}) == before);
  const std::vector<float> images(64, 0.0F);
  fs::rename(copy.folder, copy.root / "old");
  fs::copy(other.folder, copy.folder);  // the same bytes, but who knows
  CHECK(flow.sample({1}) == before);    // all that this takes is open
  tarflow::Flow late(other.folder.string(), graphs());
  support::write(other.folder / "block_03.step.onnx", support::read(other.folder / "block_01.step.onnx"));
  auto found = failure([&] { late.sample({1}); });
  CHECK(found.status == TARFLOW_BUNDLE);
  CHECK(found.says("block_03.step.onnx' was replaced or changed after its hash was checked; open the bundle again"));
  const Copy gone;
  tarflow::Flow left(gone.folder.string(), graphs());
  fs::remove_all(gone.folder);
  CHECK(failure([&] { left.sample({1}); }).says("was replaced or changed"));
}

TEST_CASE("a limit of the machine is not called the bundle's fault") {
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  rlimit few = before;
  few.rlim_cur = 3;  // those that are open already
  REQUIRE(setrlimit(RLIMIT_NOFILE, &few) == 0);
  const auto found = failure([&] { tarflow::Flow flow(TARFLOW_DEMO); });
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(found.status == TARFLOW_MACHINE);
  CHECK_MESSAGE(found.says("Too many open files"), found.message);
}

TEST_CASE("weights of another model are refused") {
  const Copy copy;
  copy.edit([](Json& manifest) { manifest["config"]["classes"] = 9; });
  CHECK(opening(copy.folder).says("another model than its weights"));
}

TEST_CASE("a graph that another is given for fails as a bundle, not as a crash") {
  const Copy copy;
  copy.edit([](Json& manifest) {
    for (Json& block : manifest["blocks"]) block["graphs"]["step"] = block["graphs"]["forward"];
  });
  tarflow::Flow flow(copy.folder.string(), graphs());
  const auto found = failure([&] { flow.sample({1, 2}); });
  CHECK(found.status == TARFLOW_BUNDLE);
  CHECK(found.says("block 3's step graph"));
}

TEST_CASE("providers and libraries that are not to be had say what to do") {
  tarflow::OpenOptions options;
  const auto open = [&] { return failure([&] { tarflow::Flow flow(TARFLOW_DEMO, options); }); };
  for (const char* unknown : {"abacus", "ort-tensorrt"}) {
    options.provider = unknown;
    CHECK(open().status == TARFLOW_INPUT);
    CHECK(open().says("expected one of auto, native, cpu, cuda, tensorrt"));
  }
  options.provider = "cuda";
  CHECK(open().status == TARFLOW_MACHINE);
  CHECK(open().says("CUDAExecutionProvider"));
  options.provider = "tensorrt";
  CHECK(open().status == TARFLOW_MACHINE);
  const auto without = open();  // in a library built without TensorRT, or on a machine without a GPU
  CHECK((without.says("built without TensorRT; build it with -DTENSORRT_ROOT") ||
         without.says("no NVIDIA GPU can be used")));
  options.provider = "cpu";
  options.onnxruntime = "/nowhere/libonnxruntime.so";
  CHECK(open().status == TARFLOW_MACHINE);
  CHECK(open().says("TARFLOW_ONNXRUNTIME"));
  options.onnxruntime = "libm.so.6";
  CHECK(open().says("no OrtGetApiBase"));
  options.onnxruntime = nullptr;
  options.threads = -1;
  CHECK(open().status == TARFLOW_INPUT);
  options.threads = 1;
  for (const char* any : {"auto", "", static_cast<const char*>(nullptr)}) {
    options.provider = any;
    const tarflow::Flow flow(TARFLOW_DEMO, options);
    CHECK(std::string(flow.shape().backend).find("native fp32 (") == 0);
    CHECK(std::string(flow.shape().backend).find("; not tensorrt: ") != std::string::npos);
  }
}
