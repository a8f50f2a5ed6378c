// Any bytes as engines.json: a record that keeps its promises, or Error(TARFLOW_BUNDLE).
#include <cstdlib>

#include "error.hpp"
#include "tensorrt/record.hpp"

using namespace tarflow::internal;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const Record record = read_record({reinterpret_cast<const char*>(data), size}, "engines.json");
    for (const auto& [name, engine] : record.engines) {
      if (name.find('/') != std::string::npos || engine.sha256.size() != 64 || engine.block < 0) std::abort();
    }
    if (record.precision == nullptr || record.precision->tensorrt < 0) std::abort();
    for (const std::vector<Profile>& profiles : record.profiles) {
      if (profiles.empty()) std::abort();
      for (const Profile& profile : profiles) {
        if (profile.batch[0] < 1 || profile.batch[0] > profile.batch[1] || profile.batch[1] > profile.batch[2])
          std::abort();
      }
    }
    record.misfit(record.bundle, 2, {"tensorrt", record.version, "GPU", "9.0"});
  } catch (const Error& error) {
    if (error.status != TARFLOW_BUNDLE || error.what()[0] == '\0') std::abort();
  }
  return 0;
}
