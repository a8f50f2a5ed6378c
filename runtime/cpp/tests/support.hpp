// A copy of the demo bundle to damage, and the golden pairs PyTorch made for it.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <tarflow.hpp>
#include <vector>

namespace support {

namespace fs = std::filesystem;
using Json = nlohmann::json;

inline std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write(const fs::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

class Copy {
 public:
  Copy() {
    std::string name = (fs::temp_directory_path() / "tarflow-test-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    root = name;
    folder = root / "bundle";
    fs::copy(TARFLOW_DEMO, folder);
  }
  ~Copy() { fs::remove_all(root); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  void edit(const std::function<void(Json&)>& change) const {
    Json manifest = Json::parse(read(folder / "manifest.json"));
    change(manifest);
    write(folder / "manifest.json", manifest.dump());
  }

  fs::path root, folder;
};

// The float32 tensor of a safetensors file.
inline std::vector<float> tensor(const fs::path& path, const std::string& name) {
  const std::string content = read(path);
  std::uint64_t length = 0;
  REQUIRE(content.size() > 8);
  std::memcpy(&length, content.data(), 8);
  const Json entry = Json::parse(content.substr(8, length)).at(name);
  REQUIRE(entry.at("dtype") == "F32");
  const std::size_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
  std::vector<float> numbers((end - begin) / 4);
  std::memcpy(numbers.data(), content.data() + 8 + length + begin, end - begin);
  return numbers;
}

inline float largest(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  float most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= most)) most = std::fabs(a[i] - b[i]);
  }
  return most;
}

// The status and message of what must fail.
struct Failure {
  int status;
  std::string message;
  bool says(const std::string& words) const { return message.find(words) != std::string::npos; }
};

inline Failure failure(const std::function<void()>& work) {
  try {
    work();
  } catch (const tarflow::Error& error) {
    return {error.status, error.what()};
  }
  FAIL("nothing failed");
  return {};
}

}  // namespace support
